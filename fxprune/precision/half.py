"""An ONNX file in half precision, made from a verified one: what would overflow stays in single precision."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from fxprune.errors import ExportError, OptionError, ParityError
from fxprune.export.onnx_file import ExportRecord, export_onnx, validated, writable
from fxprune.export.running import run, tensors_of
from fxprune.files import replacing
from fxprune.graph.call import Inputs, flat_tensors, positional
from fxprune.runtimes import onnxruntime
from fxprune.runtimes.feeds import Array
from fxprune.tracing.evaluation import evaluation_copy

__all__ = ["export_half"]

logger = logging.getLogger(__name__)

_LIMIT = 1e4
"""The largest activation in half precision, whose numbers end at 65504: other images may reach more than these."""
_TOLERANCE = 5e-3

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def export_half(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any, **settings: Any
) -> ExportRecord:
    """Writes `model` as an ONNX file that computes in half precision, and whose inputs and outputs keep their types.

    On the CPU onnxruntime computes half precision in single precision, which hides what overflows. So every value of
    the written file is looked at in the type that it has there, and torch computes in half precision too, where it
    can and where no node was kept.

    Args:
        model: As for `export_onnx`.
        path: Likewise.
        example_inputs: Likewise; nodes that exceed the range on them are kept in single precision.
        **settings: Likewise; `tolerance` is that of half precision, by default 5e-3 times the largest output.

    Raises:
        OptionError, ExportError: As `export_onnx`; or the inputs are in half precision already.
        ParityError: The file overflows, or computes something else than the network; it is not written.
    """
    tolerance = settings.pop("tolerance", None)
    examples, target = validated(example_inputs, tolerance), writable(path)
    if any(x.dtype == torch.float16 for x in examples.tensors()):
        raise OptionError(
            "fp16=True starts from single precision, and the inputs are in half already: leave it out"
        )
    network = positional(evaluation_copy(model).requires_grad_(False).cpu(), examples)
    rows = Inputs(flat_tensors(examples))
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        single = Path(folder) / "single.onnx"
        record = export_onnx(model, single, example_inputs, **settings)
        kept, worst, accepted = _convert(onnx.load(single), target, network, rows, tolerance)
    if kept:
        logger.info("kept in single precision, as they exceed %g: %s", _LIMIT, ", ".join(kept))
    return replace(
        record,
        path=os.fspath(path),
        batch_sizes=(rows.batch_size,),
        max_abs_diff=worst,
        tolerance=accepted,
        bytes=target.stat().st_size,
        kept=kept,
        runtimes=("onnxruntime",),
        note="not checked in OpenVINO, which would compute it in single precision",
    )


def _convert(
    single: onnx.ModelProto, path: Path, network: nn.Module, rows: Inputs, tolerance: float | None
) -> tuple[tuple[str, ...], float, float]:
    """Writes the file; returns the nodes that were kept, the largest difference to the network, the acceptable one."""
    expected = _doubles(run(network, rows))
    accepted = _TOLERANCE * max(1.0, _largest(expected)) if tolerance is None else tolerance
    values = {
        t.name: onnx.numpy_helper.to_array(t) for t in single.graph.initializer if t.data_type in _FLOATS
    }
    values |= dict(zip((entry.name for entry in single.graph.input), _arrays(rows), strict=True))
    values |= _activations(single, rows)
    large = {name for name, value in values.items() if not _largest([value]) <= _LIMIT}
    kept = tuple(node.name for node in single.graph.node if large & {*node.input, *node.output})
    half = _straightened(convert_float_to_float16(single, keep_io_types=True, node_block_list=list(kept)))
    onnx.checker.check_model(half, full_check=True)
    _require_finite(half, rows)
    with replacing(path) as temporary:
        temporary.write_bytes(half.SerializeToString(deterministic=True))
        session = onnxruntime.open_session(
            temporary, device="cpu", threads=torch.get_num_threads(), half=True
        )
        answers = [onnxruntime.run(session, rows.tensors())]
        in_torch = None if kept else _in_torch(network, rows)  # it would overflow where nodes were kept
        answers += [] if in_torch is None else [in_torch]
        worst = _largest(
            np.subtract(x, y, dtype=np.float64)
            for answer in answers
            for x, y in zip(answer, expected, strict=True)
        )
        if not worst <= accepted:
            raise ParityError(
                f"in half precision the network is {worst:.3g} away from itself where {accepted:.3g} is acceptable; no "
                "file was written. Keep it in single precision",
                max_abs_diff=worst,
                tolerance=accepted,
            )
    return kept, worst, accepted


def _arrays(rows: Inputs) -> list[Array]:
    return [x.numpy() for x in rows.tensors()]


def _activations(proto: onnx.ModelProto, rows: Inputs) -> dict[str, Array]:
    """Every floating-point value that a graph computes, in the type that it has there."""
    shown = onnx.shape_inference.infer_shapes(proto)
    known = {entry.name for entry in shown.graph.output}
    for entry in shown.graph.value_info:
        if entry.name not in known and entry.type.tensor_type.elem_type in _FLOATS:
            shown.graph.output.append(entry)
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        path = Path(folder) / "shown.onnx"
        path.write_bytes(shown.SerializeToString())
        session = onnxruntime.open_session(
            path, device="cpu", threads=torch.get_num_threads(), optimised=False
        )
        values = onnxruntime.run(session, rows.tensors())
    return {entry.name: value for entry, value in zip(session.get_outputs(), values, strict=True)}


def _straightened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in order; from one node kept in single precision to the next no value goes through half precision."""
    model = ir.from_proto(proto)
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if before is None or before.op_type != "Cast":
            continue
        to = [cast.attributes.get_int("to") for cast in (before, node)]
        if to == [ir.DataType.FLOAT16, ir.DataType.FLOAT]:
            node.replace_input_with(0, before.inputs[0])
    for node in reversed(list(model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
    model.graph.sort()
    straight = ir.to_proto(model)
    del straight.graph.value_info[
        :
    ]  # the converter's types are not those of the nodes kept in single precision
    return onnx.shape_inference.infer_shapes(straight, strict_mode=True)


def _require_finite(half: onnx.ModelProto, rows: Inputs) -> None:
    lost = [name for name, x in _activations(half, rows).items() if not np.isfinite(x).all()]
    if lost:
        raise ParityError(
            f"in half precision {', '.join(lost)} overflow; no file was written. Keep the network in single precision",
            max_abs_diff=float("inf"),
            tolerance=0.0,
        )


def _in_torch(network: nn.Module, rows: Inputs) -> list[Array] | None:
    """What torch computes in half precision; None where it cannot on the CPU."""
    halved = rows.map(lambda x: x.half() if x.is_floating_point() else x)
    try:
        return _doubles(run(copy.deepcopy(network).half(), halved))
    except ExportError as error:
        logger.info("torch does not compute this network in half precision on the CPU: %s", error)
        return None


def _doubles(result: Any) -> list[Array]:
    return [x.double().numpy() for x in tensors_of(result)]


def _largest(values: Iterable[Array]) -> float:
    """The largest absolute value; NaN where there is one."""
    return float(np.max([0.0, *(np.abs(x.astype(np.float64)).max(initial=0.0) for x in values)]))
