"""Writing a network as ONNX, and proving in onnxruntime that it computes the same before the file appears."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import ArtifactError, ExportError, MeasurementError, OptionError, ParityError
from fxprune.export import serving
from fxprune.export.attention import FourDimensionalAttention
from fxprune.export.messages import innermost, quiet
from fxprune.files import remove_leftovers, replacing
from fxprune.graph.call import Inputs
from fxprune.tracing.evaluation import evaluation_copy

__all__ = ["ExportRecord", "export_onnx"]

_logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 5)
# torch.export takes sizes 0 and 1 for constants, and 2 is often another dimension's size too.
_EXPORT_BATCH = 3
_PROTOBUF_LIMIT = 2**31
_TOLERANCE = 1e-4
_TOLERANCE_HALF = 5e-3
_ADVICE = (
    "Look for sizes written as constants (x.view(1, -1): use x.flatten(1)), for graphs that torch.export "
    "captured with a fixed batch (capture them with a dynamic one), and for operators that ONNX lacks"
)


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """A written ONNX file.

    Attributes:
        path: Where it lies.
        opset: Version of the default operator set.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
        batch_sizes: Batch sizes at which it was compared with torch; empty if it was not.
        max_abs_diff: The largest absolute difference seen, 0 if it was not compared.
        tolerance: The largest that would have been accepted.
        bytes: Size of the file.
    """

    path: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    max_abs_diff: float
    tolerance: float
    bytes: int


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Sequence[Tensor] | dict[str, Tensor],
    *,
    verify: bool = True,
    tolerance: float | None = None,
    opset: int | None = None,
    dynamic_image_size: bool = False,
) -> ExportRecord:
    """Write `model` as one ONNX file with a free batch size; the file appears only if it agrees with torch.

    Args:
        model: Any module or GraphModule; it is not changed.
        path: The file to write, replaced if it exists.
        example_inputs: Positional inputs, or keyword inputs by name; dimension 0 is the batch.
        verify: Compare with torch in onnxruntime on the CPU at three batch sizes.
        tolerance: Largest absolute difference accepted. By default 1e-4 (half precision: 5e-3) times the
            largest absolute output, or times 1 if that is larger.
        opset: Version of the default operator set; torch's own choice if `None`.
        dynamic_image_size: Leave height and width of every four-dimensional input free as well.

    Raises:
        ExportError: The network has no ONNX form with a free batch size, or none in the opset that was asked for;
            it exceeds 2 GB, returns something else than tensors, or cannot be written.
        ParityError: onnxruntime computes something else than torch; no file is left.
        OptionError: An input lacks a batch dimension, batch sizes differ, or the tolerance is negative.
    """
    examples = _validated(example_inputs, tolerance)
    network = evaluation_copy(model).requires_grad_(False).cpu()
    _require_single_file(network)
    rows = _resized(examples, _EXPORT_BATCH, seed=0)
    proto = _wellformed(network, rows, opset, dynamic_image_size)
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, written):
        raise ExportError(
            f"opset={opset} was asked for, and torch's exporter can write {type(network).__name__} in opset {written} "
            "and not convert it: give that, or leave opset out"
        )
    remove_leftovers(Path(path).parent)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(proto.SerializeToString())
            diff, accepted = 0.0, tolerance or 0.0
            if verify:
                diff, accepted = _compare(network, temporary, examples, tolerance)
            size = temporary.stat().st_size
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    _logger.info("wrote %s: %d bytes, largest difference %.3g of %.3g", path, size, diff, accepted)
    return ExportRecord(
        path=os.fspath(path),
        opset=written,
        inputs=tuple(entry.name for entry in proto.graph.input),
        outputs=tuple(entry.name for entry in proto.graph.output),
        batch_sizes=BATCH_SIZES if verify else (),
        max_abs_diff=diff,
        tolerance=accepted,
        bytes=size,
    )


def _validated(example_inputs: Sequence[Tensor] | dict[str, Tensor], tolerance: float | None) -> Inputs:
    """The inputs on the CPU, detached."""
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"tolerance={tolerance}: give an absolute difference of 0 or more, or None")
    values = pytree.tree_leaves(example_inputs)
    if not values or any(not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] == 0 for x in values):
        raise OptionError(
            "example_inputs must be one or more tensors, each with a batch dimension that is not empty"
        )
    if len({x.shape[0] for x in values}) > 1:
        raise OptionError(
            f"the inputs' batch sizes differ: {[tuple(x.shape) for x in values]}; dimension 0 is the batch"
        )
    named = example_inputs if isinstance(example_inputs, dict) else {}
    return Inputs(() if named else tuple(example_inputs), named).map(lambda x: x.detach().cpu())


def _resized(examples: Inputs, batch: int, *, seed: int) -> Inputs:
    """The examples at another batch size: rows repeated in a drawn order, with a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def resize(x: Tensor) -> Tensor:
        order = torch.randperm(batch, generator=generator) % x.shape[0]
        rows = x[order].clone()
        if rows.is_floating_point():
            noise = torch.randn(rows.shape, generator=generator).to(rows.dtype)
            rows += 0.01 * rows.std(correction=0) * noise
        return rows

    return examples.map(resize)


def _require_single_file(network: nn.Module) -> None:
    tensors = [x for x in network.state_dict().values() if isinstance(x, Tensor)]
    total = sum(x.untyped_storage().nbytes() for x in {x.data_ptr(): x for x in tensors}.values())
    if total >= _PROTOBUF_LIMIT:
        raise ExportError(
            f"the weights take {total / 2**30:.1f} GiB, and protobuf, in which ONNX files are written, ends "
            "at 2 GiB per file: convert the network to half precision first, or keep it as .pt2"
        )


def _wellformed(
    network: nn.Module, rows: Inputs, opset: int | None, dynamic_image_size: bool
) -> onnx.ModelProto:
    """Convert the network; once more without torch's optimizer of ONNX graphs, where that leaves a malformed one."""
    for optimize in (True, False):
        proto = _convert(network, rows, opset, dynamic_image_size, optimize=optimize)
        try:
            onnx.checker.check_model(proto, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            refusal = error
            _logger.warning("onnx.checker refuses the graph (optimize=%s): %s", optimize, error)
        else:
            return proto
    raise ExportError(f"torch's exporter wrote ONNX that onnx.checker refuses: {refusal}") from refusal


def _convert(
    network: nn.Module, rows: Inputs, opset: int | None, dynamic_image_size: bool, *, optimize: bool
) -> onnx.ModelProto:
    """Capture the network with torch's exporter; anything that it cannot do becomes an `ExportError`."""
    try:
        with quiet(), FourDimensionalAttention():
            program = torch.onnx.export(
                network,
                args=rows.args,
                kwargs=rows.kwargs or None,
                dynamic_shapes=_free_dimensions(network, rows, dynamic_image_size),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                optimize=optimize,
            )
    except Exception as error:
        _run(network, rows)  # what it says, if anything, is plainer
        raise _refusal(network, innermost(error)) from error
    if program is None:
        raise _refusal(network, "torch's exporter returned nothing")
    proto = program.model_proto
    for part in (proto.graph, *proto.functions):
        _forget_sources(part)
    for entry in proto.graph.input:  # fixed, without a word, where a graph from torch.export was captured so
        batch = entry.type.tensor_type.shape.dim[0]
        if not batch.dim_param:
            raise _refusal(network, f"its graph fixes the batch of {entry.name!r} to {batch.dim_value}")
    return proto


def _forget_sources(part: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Take the lines of the user's source code, and where they stood on this machine, off every node."""
    for node in part.node:
        kept = [x for x in node.metadata_props if x.key == "namespace"]  # what viewers group nodes by
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _forget_sources(inner)


def _free_dimensions(network: nn.Module, rows: Inputs, image_size: bool) -> Any:
    """The dimensions that stay symbolic, in the arrangement of the network's arguments."""
    batch = torch.export.Dim("batch", min=1)
    free = torch.export.Dim.DYNAMIC

    def of(x: Tensor) -> dict[int, object]:
        return {0: batch, 2: free, 3: free} if image_size and x.dim() == 4 else {0: batch}

    shapes = pytree.tree_map(of, rows.kwargs or rows.args)
    first = next(iter(inspect.signature(network.forward).parameters.values()), None)
    # torch.export describes everything that arrives through *args as one nested tuple.
    starred = not rows.kwargs and first is not None and first.kind is first.VAR_POSITIONAL
    return (shapes,) if starred else shapes


def _compare(
    network: nn.Module, path: Path, examples: Inputs, tolerance: float | None
) -> tuple[float, float]:
    """The largest absolute difference between the file and the network at several batch sizes, and the acceptable."""
    try:
        session = serving.open_session(
            path,
            device="cpu",
            threads=torch.get_num_threads(),
            half=any(x.dtype == torch.float16 for x in examples.tensors()),
        )
    except MeasurementError as error:
        raise ExportError(f"the ONNX file cannot be verified, no file was written: {error}") from error
    worst, scale, half = 0.0, 1.0, False
    for batch in BATCH_SIZES:
        rows = _resized(examples, batch, seed=batch)
        expected = [x.numpy() for x in _run(network, rows)]
        named = [rows.kwargs[entry.name] for entry in session.get_inputs() if entry.name in rows.kwargs]
        try:
            actual = serving.run(session, named or rows.args)
        except MeasurementError as error:
            raise _refusal(network, innermost(error)) from error
        shapes = [x.shape for x in expected], [x.shape for x in actual]
        if shapes[0] != shapes[1]:
            raise ParityError(
                f"at batch size {batch} onnxruntime returns shapes {shapes[1]}, torch {shapes[0]}; "
                "no file was written",
                max_abs_diff=float("inf"),
                tolerance=tolerance or 0.0,
            )
        for reference, found in zip(expected, actual, strict=True):
            half = half or reference.dtype == np.float16
            exact = reference.astype(np.float64)
            # NaN spreads through max() of an array, though not through the built-in one.
            worst = float(np.max([worst, np.abs(exact - found.astype(np.float64)).max(initial=0.0)]))
            scale = float(np.max([scale, np.abs(exact).max(initial=0.0)]))
    accepted = tolerance if tolerance is not None else (_TOLERANCE_HALF if half else _TOLERANCE) * scale
    if not worst <= accepted:
        raise ParityError(
            f"the ONNX file disagrees with torch by {worst:.3g} where {accepted:.3g} is acceptable "
            f"(batch sizes {BATCH_SIZES}); no file was written. Give tolerance= if that is harmless for you",
            max_abs_diff=worst,
            tolerance=accepted,
        )
    return worst, accepted


def _run(network: nn.Module, rows: Inputs) -> list[Tensor]:
    """The tensors that the network returns; an `ExportError` where it fails, or returns what ONNX cannot."""
    try:
        with torch.no_grad():
            result = network(*rows.args, **rows.kwargs)
    except Exception as error:  # the user's network may raise anything
        raise _refusal(network, f"it fails at batch size {rows.batch_size}: {innermost(error)}") from error
    values = [value for value in pytree.tree_leaves(result) if value is not None]
    for value in values:
        if not isinstance(value, Tensor):
            raise _refusal(
                network,
                f"its output holds a value of type {type(value).__name__}, and ONNX files return tensors only",
                "Wrap the network in a module that returns its tensors, in a tuple, a list or a dict",
            )
    return values


def _refusal(network: nn.Module, reason: str, advice: str = _ADVICE) -> ExportError:
    what = f"{type(network).__name__} cannot be written as ONNX with a free batch size"
    return ExportError(f"{what}: {reason}. {advice}")
