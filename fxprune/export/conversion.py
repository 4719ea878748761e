"""From a network to an ONNX model in memory: torch's exporter, and what has to be set right before and behind it."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import version_converter
from torch import Tensor, fx, nn

from fxprune.errors import ExportError, FxpruneError
from fxprune.export.attention import FourDimensionalAttention
from fxprune.export.messages import innermost, quiet
from fxprune.export.running import refusal, run
from fxprune.graph.call import Inputs
from fxprune.passes import FoldBatchNorm
from fxprune.tracing.evaluation import evaluation_copy
from fxprune.tracing.trace import trace

__all__ = ["convert", "folded"]

logger = logging.getLogger(__name__)

# Torch's exporter writes no older one.
_OLDEST_OPSET = 18
# The first whose nodes may carry metadata.
_METADATA_IR = 10


def folded(network: nn.Module, rows: Inputs) -> nn.Module:
    """The network without batch norms behind convolutions, where it can be read as a graph.

    torch's exporter would fold them too; releases of it wrote wrong files in doing so.

    Args:
        network: In evaluation mode; it is not changed.
        rows: Inputs to trace it with where it is no graph yet; one that cannot be traced stays as it is.
    """
    try:
        graph = (
            evaluation_copy(network)
            if isinstance(network, fx.GraphModule)
            else trace(network, rows.given, front_end="fx")
        )
    except FxpruneError as error:
        logger.info("batch norms are left to torch's exporter: %s", error)
        return network
    FoldBatchNorm()(graph)
    return graph


def convert(
    network: nn.Module,
    rows: Inputs,
    *,
    opset: int | None,
    ir_version: int | None,
    dynamic_image_size: bool,
    optimize: bool,
) -> ir.Model:
    """An ONNX model with a free batch size, in the versions asked for, without traces of this machine.

    Args:
        network: In evaluation mode, on the CPU.
        rows: A batch of inputs.
        opset: Version of the default operator set; torch's own choice if `None`.
        ir_version: Version of the file format, likewise.
        dynamic_image_size: Leave height and width of every four-dimensional input free as well.
        optimize: Whether torch's optimizer of ONNX graphs takes part.

    Raises:
        ExportError: It has no such form; the message says why.
    """
    try:
        with quiet(), FourDimensionalAttention():
            program = torch.onnx.export(
                _with_parameters(network, len(rows.args)),
                args=rows.args,
                dynamic_shapes=_free_dimensions(rows, dynamic_image_size),
                dynamo=True,
                verbose=False,
                opset_version=None if opset is None else max(opset, _OLDEST_OPSET),
                optimize=optimize,
            )
    except Exception as error:
        run(network, rows)  # what it says, if anything, is plainer
        raise refusal(network, innermost(error)) from error
    if program is None:
        raise refusal(network, "torch's exporter returned nothing")
    model = program.model
    for value in model.graph.inputs:  # fixed, without a word, where a graph from torch.export was captured so
        if value.shape is None or isinstance(value.shape[0], int):
            raise refusal(network, f"its graph fixes the batch of {value.name!r}: its shape is {value.shape}")
    _forget_sources(model)
    return _in_format(_in_opset(model, opset), ir_version)


def _free_dimensions(rows: Inputs, image_size: bool) -> tuple[dict[int, object], ...]:
    """The dimensions that stay symbolic, each with its name, for each input."""
    batch = torch.export.Dim("batch", min=1)
    images = 0
    shapes = []
    for x in rows.args:
        shape: dict[int, object] = {0: batch}
        if image_size and x.dim() == 4:
            number = f"_{images}" if images else ""
            shape |= {2: f"height{number}", 3: f"width{number}"}
            images += 1
        shapes.append(shape)
    return tuple(shapes)


def _with_parameters(network: nn.Module, count: int) -> nn.Module:
    """The network with a parameter for each input where it takes `*args`, for which torch 2.9 writes broken guards."""
    kinds = {p.kind for p in inspect.signature(network.forward).parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return network
    plain, named = network.forward, copy.copy(network)

    def forward(*tensors: Tensor) -> Any:
        return plain(*tensors)

    names = [f"input_{i}" for i in range(count)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions may have one
    named.forward = forward
    return named


def _forget_sources(model: ir.Model) -> None:
    """Takes the lines of the user's source code, and where they stood on this machine, off everything."""
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in (*scopes, *model.graph.subgraphs()):
        part.metadata_props.clear()
        part.doc_string = None
    for node in (node for scope in scopes for node in scope.all_nodes()):
        namespace = node.metadata_props.get("namespace")  # what viewers group nodes by
        node.metadata_props.clear()
        if namespace is not None:
            node.metadata_props["namespace"] = namespace
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _in_opset(model: ir.Model, opset: int | None) -> ir.Model:
    """The model in the operator set asked for: older ones than torch writes come from onnx's own converter."""
    written = model.opset_imports[""]
    if opset in (None, written):
        return model
    reason = f"torch's exporter writes {written} instead"
    if opset < written:
        for node in model.graph.all_nodes():
            if node.op_type == "ReduceMean" and node.attributes.get_int("noop_with_empty_axes", 0) == 0:
                node.attributes.pop("noop_with_empty_axes", None)  # a default that older versions do not know
        try:
            proto = version_converter.convert_version(ir.to_proto(model), opset)
            onnx.checker.check_model(proto, full_check=True)
        except Exception as error:  # the converter's own exceptions share no base class
            reason = f"onnx's converter cannot make it out of {written}: {innermost(error)}"
        else:
            return ir.from_proto(proto)
    raise ExportError(f"opset={opset} was asked for, and {reason}. Ask for {written}, or leave opset out")


def _in_format(model: ir.Model, ir_version: int | None) -> ir.Model:
    if ir_version in (None, model.ir_version):
        return model
    opset = model.opset_imports[""]
    oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    if not oldest <= ir_version <= onnx.IR_VERSION:
        raise ExportError(
            f"ir_version={ir_version} was asked for, and onnx {onnx.__version__} writes opset {opset} in {oldest} to "
            f"{onnx.IR_VERSION}: ask for one of these, or for an older opset"
        )
    model.ir_version = ir_version
    if ir_version < _METADATA_IR:
        for node in model.graph.all_nodes():
            node.metadata_props.clear()
    return model
