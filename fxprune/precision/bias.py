"""What rounding its weights adds to the mean of a convolution's outputs, taken off its bias."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch

from fxprune.runtimes import onnxruntime

__all__ = ["add_biases", "correct_biases"]

_LINEAR = ("Conv", "ConvTranspose", "Gemm")

Array = npt.NDArray[np.float64]


def add_biases(single: onnx.ModelProto) -> None:
    """Gives convolutions without a bias one of zeros, so that there is something to correct."""
    weights = {one.name: one for one in single.graph.initializer}
    for node in single.graph.node:
        if node.op_type == "Conv" and len(node.input) == 2 and node.input[1] in weights:
            zeros = np.zeros(weights[node.input[1]].dims[0], np.float32)
            node.input.append(f"{node.output[0]}_bias")
            single.graph.initializer.append(onnx.numpy_helper.from_array(zeros, node.input[2]))


def correct_biases(
    rounded: onnx.ModelProto,
    single: onnx.ModelProto,
    folder: Path,
    batches: Sequence[tuple[torch.Tensor, ...]],
) -> onnx.ModelProto:
    """The rounded model, each channel's mean where it was in single precision.

    With weights `W`, rounded to `Q`, an operator that reads `x` returns `(W - Q) x` less than it should. The mean of
    that over images and places is added to its bias. What is read is taken from single precision, so that one run
    serves all operators: those in front are corrected as well.

    Args:
        rounded: With pairs of `QuantizeLinear` and `DequantizeLinear`.
        single: What it was made from; nodes have the same names.
        folder: For a temporary file.
        batches: Inputs.
    """
    corrected, probe = ir.from_proto(rounded), ir.from_proto(single)
    twins = {node.name: node for node in corrected.graph}
    biases: list[tuple[ir.Value, Array]] = []
    probe.graph.outputs.clear()
    for node in list(probe.graph):
        twin = twins.get(node.name)
        if node.op_type not in _LINEAR or twin is None or len(twin.inputs) < 3:
            continue
        weights, bias = (_rounded_constant(twin.inputs[i]) for i in (1, 2))
        exact = node.inputs[1]
        if weights is None or bias is None or exact is None or exact.const_value is None:
            continue
        probe.graph.outputs.append(_mean_of_lost(probe.graph, node, exact.const_value.numpy() - weights[2]))
        biases.append(bias[:2])
    if not biases:
        return rounded
    path = folder / "probe.onnx"
    ir.save(probe, path)
    session = onnxruntime.open_session(path, device="cpu", threads=torch.get_num_threads())
    runs = [onnxruntime.run(session, batch) for batch in batches]
    for (whole, scale), *lost in zip(biases, *runs, strict=True):
        assert whole.const_value is not None
        mean = np.concatenate([x.reshape(len(x), -1) for x in lost]).mean(axis=0, dtype=np.float64)
        steps = whole.const_value.numpy() + np.rint(mean / scale)
        whole.const_value = ir.tensor(steps.astype(np.int32), name=whole.name)
    return ir.to_proto(corrected)


def _mean_of_lost(graph: ir.Graph, node: ir.Node, lost: Array) -> ir.Value:
    """What an operator returns less, averaged over all places of an image, if it has places."""
    name = f"{node.outputs[0].name}_lost"
    weights = ir.Value(name=f"{name}_weights")
    weights.const_value = ir.tensor(lost.astype(np.float32), name=weights.name)
    graph.register_initializer(weights)
    again = ir.node(node.op_type, [node.inputs[0], weights], node.attributes, name=name)
    graph.append(again)
    last = again
    if lost.ndim > 2:
        last = ir.node("GlobalAveragePool", [again.outputs[0]], name=f"{name}_mean")
        graph.append(last)
    last.outputs[0].name, last.outputs[0].dtype = f"{name}_output", ir.DataType.FLOAT
    return last.outputs[0]


def _rounded_constant(value: ir.Value | None) -> tuple[ir.Value, Array, Array] | None:
    """Whole numbers that are constant, their scale, and what they stand for; None if it is something else."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    constants = [None if x is None else x.const_value for x in node.inputs]
    whole, arrays = node.inputs[0], [x.numpy().astype(np.float64) for x in constants if x is not None]
    if whole is None or len(arrays) < len(node.inputs):
        return None
    numbers, scale, zero = arrays if len(arrays) == 3 else (*arrays, np.zeros_like(arrays[1]))
    shape = [1] * numbers.ndim
    if scale.ndim:
        shape[node.attributes.get_int("axis", 1)] = -1
    return whole, scale, (numbers - zero.reshape(shape)) * scale.reshape(shape)
