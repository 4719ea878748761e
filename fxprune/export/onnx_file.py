"""Writing a network as ONNX, and proving in the runtimes that it computes the same before the file appears."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import nn

from fxprune._version import __version__
from fxprune.errors import ArtifactError, ExportError, OptionError
from fxprune.export.conversion import convert, folded
from fxprune.export.naming import NAMES, names_of, rename, settled
from fxprune.export.parity import BATCH_SIZES, Parity, compare, resized
from fxprune.export.running import run
from fxprune.files import check_writable, replacing_with_company
from fxprune.graph.call import Inputs, flat_tensors, positional
from fxprune.graph.weights import hash_weights
from fxprune.tracing.evaluation import evaluation_copy
from fxprune.tracing.trace import split_inputs

__all__ = ["EightBits", "ExportRecord", "export_onnx", "validated", "writable"]

logger = logging.getLogger(__name__)

# torch.export takes sizes 0 and 1 for constants, and 2 is often another dimension's size too.
_EXPORT_BATCH = 3
# Protobuf, in which ONNX files are written, ends at 2 GiB a file; the graph itself needs some of them.
_SINGLE_FILE_BYTES = 2**31 - 2**26


@dataclass(frozen=True, slots=True)
class EightBits:
    """How a file in eight bits was made, and how near it comes to single precision.

    Attributes:
        images: Images that gave the ranges of its values.
        held_back: Others, on which it was compared.
        agreement: Share of these to which both give the same class, None without class scores.
        error: Mean squared difference of the outputs on them, over the variance of the outputs.
        convolutions: How many it has; onnxruntime computes all of them in eight bits.
        reduce_range: Whether its weights take seven bits, as on CPUs without VNNI they should.
        openvino_agreement: Share of these images to which OpenVINO and onnxruntime give the same class with this file;
            None without class scores, or where OpenVINO did not run it.
        openvino_error: Mean squared difference of what the two return, over the variance; None likewise.
    """

    images: int
    held_back: int
    agreement: float | None
    error: float
    convolutions: int
    reduce_range: bool
    openvino_agreement: float | None = None
    openvino_error: float | None = None


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """A written ONNX file.

    Attributes:
        path: Where it lies.
        opset: Version of the default operator set.
        ir_version: Version of the file format.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
        batch_sizes: Batch sizes at which it was compared with torch; empty if it was not.
        max_abs_diff: The largest absolute difference seen, 0 if it was not compared.
        tolerance: The largest that would have been accepted; any, in eight bits.
        bytes: Size of the file, with that of its weights where they lie beside it.
        weights: SHA-256 of the network's weights, as it stands in the file's metadata.
        kept: Nodes that a file in half precision keeps in single precision.
        int8: Of a file in eight bits.
        runtimes: What it was compared in, with torch or with single precision; empty if it was not.
        note: Why OpenVINO is not among them, if it is not.
    """

    path: str
    opset: int
    ir_version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    max_abs_diff: float
    tolerance: float
    bytes: int
    weights: str
    kept: tuple[str, ...] = ()
    int8: EightBits | None = None
    runtimes: tuple[str, ...] = ()
    note: str | None = None

    @property
    def checked(self) -> str:
        """What it was compared with torch in, in words."""
        if not self.runtimes:
            return "not compared with torch"
        sizes = ", ".join(map(str, self.batch_sizes))
        known = f"agrees with torch within {self.max_abs_diff:.2g} in {', '.join(self.runtimes)} at batches of {sizes}"
        return known if self.note is None else f"{known}; {self.note}"


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Sequence[object] | dict[str, object] | Inputs,
    *,
    verify: bool = True,
    tolerance: float | None = None,
    opset: int | None = None,
    ir_version: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_image_size: bool = False,
    cuts: Sequence[str] = (),
) -> ExportRecord:
    """Writes `model` as one ONNX file with a free batch size; the file appears only if it agrees with torch.

    The file's metadata hold this package's version, the cuts and a fingerprint of the weights. Weights of nearly 2 GiB
    and more lie beside it, in a second file with `.data` behind its name.

    Args:
        model: Any module or GraphModule; it is not changed.
        path: The file to write, replaced if it exists; its folder is made if need be.
        example_inputs: Positional inputs, or keyword inputs by name; dimension 0 is the batch. Seven rows or more are
            compared as they are, fewer are repeated with a little noise. What is no tensor stays as it is given.
        verify: Compare with torch on the CPU at three batch sizes: in onnxruntime, unoptimised and optimised, and in
            OpenVINO where that is installed and knows the operators.
        tolerance: Largest absolute difference accepted. By default 1e-4 times the largest absolute output, or
            times 0.01 if that is larger (half precision: 5e-3 times it, or times 1).
        opset: Version of the default operator set; torch's own choice if `None`.
        ir_version: Version of the file format; torch's own choice if `None`.
        input_names: One name for each tensor, in the order of `example_inputs`. By default those of the file that the
            network was read from, the keywords of keyword inputs, else `input`, `input_1` and so on.
        output_names: One name for each tensor that the network returns. By default the keys of dicts and named tuples,
            and `output`, `output_1` and so on.
        dynamic_image_size: Leave height and width of every four-dimensional input free as well.
        cuts: Labels of what was cut out of the network, for the file's metadata.

    Raises:
        ExportError: The network has no ONNX form with a free batch size, or none in the opset or file format that was
            asked for; it returns something else than tensors, or cannot be written.
        ParityError: A runtime computes something else than torch; no file is left.
        OptionError: An input lacks a batch dimension, batch sizes differ, the tolerance is negative, or names are
            not unique or of another number.
    """
    examples = validated(example_inputs, tolerance)
    target = writable(path)
    original = evaluation_copy(model).requires_grad_(False).cpu()
    rows = resized(examples, _EXPORT_BATCH, seed=0)
    own = names_of((examples.args, examples.kwargs), "input"), names_of(run(original, rows), "output")
    own = getattr(original, "meta", {}).get(NAMES, own)
    names = settled(own, (input_names, output_names))
    reference, flat = positional(original, examples), Inputs(flat_tensors(examples))
    small = positional(folded(original, rows), examples)
    weights = hash_weights(original)
    about = {
        "fxprune.version": __version__,
        "fxprune.cuts": json.dumps(list(cuts)),
        "fxprune.weights_sha256": weights,
    }
    try:
        with replacing_with_company(target) as temporary:
            for optimize in (True, False):
                written = convert(
                    small,
                    Inputs(flat_tensors(rows)),
                    opset=opset,
                    ir_version=ir_version,
                    dynamic_image_size=dynamic_image_size,
                    optimize=optimize,
                )
                rename(written, *names)
                written.metadata_props.update(about)
                _write(written, temporary)
                refusal = _malformed(temporary)
                if refusal is None:
                    break
                logger.warning("onnx.checker refuses the graph (optimize=%s): %s", optimize, refusal)
            else:
                raise ExportError(f"torch's exporter wrote ONNX that onnx.checker refuses: {refusal}")
            parity = (
                compare(reference, temporary, flat, tolerance)
                if verify
                else Parity(0.0, tolerance or 0.0, (), None)
            )
            size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    record = ExportRecord(
        path=os.fspath(path),
        opset=written.opset_imports[""],
        ir_version=written.ir_version,
        inputs=names[0],
        outputs=names[1],
        batch_sizes=BATCH_SIZES if verify else (),
        max_abs_diff=parity.max_abs_diff,
        tolerance=parity.tolerance,
        bytes=size,
        weights=weights,
        runtimes=parity.runtimes,
        note=parity.note,
    )
    logger.info("wrote %s: %d bytes, %s", path, size, record.checked)
    return record


def validated(
    example_inputs: Sequence[object] | dict[str, object] | Inputs, tolerance: float | None
) -> Inputs:
    """Example inputs on the CPU, detached.

    Raises:
        OptionError: One lacks a batch dimension, batch sizes differ, or the tolerance is negative.
    """
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"tolerance={tolerance}: give an absolute difference of 0 or more, or None")
    inputs = example_inputs if isinstance(example_inputs, Inputs) else Inputs(*split_inputs(example_inputs))
    values = flat_tensors(inputs)
    if not values or any(x.dim() == 0 or x.shape[0] == 0 for x in values):
        raise OptionError(
            "example_inputs must be one or more tensors, each with a batch dimension that is not empty"
        )
    if len({x.shape[0] for x in values}) > 1:
        raise OptionError(
            f"the inputs' batch sizes differ: {[tuple(x.shape) for x in values]}; dimension 0 is the batch"
        )
    return inputs.map(lambda x: x.detach().cpu())


def writable(path: str | os.PathLike[str]) -> Path:
    """The path, once files can be written in its folder: the export takes long.

    Raises:
        ExportError: They cannot.
    """
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder: name the file to write")
    try:
        check_writable(target.parent)
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    return target


def _write(model: ir.Model, path: Path) -> None:
    weights = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    if weights > _SINGLE_FILE_BYTES:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _malformed(path: Path) -> Exception | None:
    """What onnx's checker and its inference of shapes object to."""
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return error
    return None
