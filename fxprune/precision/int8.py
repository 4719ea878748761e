"""An ONNX file in eight bits, made from a verified one and a few images, and judged on others."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from torch import nn

from fxprune.calibration.batches import CalibrationSet
from fxprune.errors import AgreementError, ExportError, OptionError, ParityError
from fxprune.export.onnx_file import EightBits, ExportRecord, export_onnx, writable
from fxprune.export.parity import BATCH_SIZES, in_openvino
from fxprune.files import replacing
from fxprune.graph.call import flat_tensors
from fxprune.judging.answers import class_scores
from fxprune.precision.bias import add_biases, correct_biases
from fxprune.runtimes import onnxruntime
from fxprune.runtimes.feeds import Array

__all__ = ["export_int8"]

logger = logging.getLogger(__name__)

_BATCH = 8
_LOW_AGREEMENT, _LARGE_ERROR = 0.9, 0.1
_CPUINFO = Path("/proc/cpuinfo")

Batches: TypeAlias = Sequence[tuple[torch.Tensor, ...]]


def export_int8(
    model: nn.Module,
    path: str | os.PathLike[str],
    images: CalibrationSet,
    held_back: CalibrationSet,
    *,
    min_agreement: float | None = None,
    reduce_range: bool | None = None,
    **settings: Any,
) -> ExportRecord:
    """Writes `model` as an ONNX file that computes in eight bits, and whose inputs and outputs keep their types.

    Weights are rounded for each channel, activations for each value; ranges are the smallest and largest values on the
    images. What rounding the weights adds to a channel's mean is taken off its bias. Where OpenVINO is installed, it is
    asked whether it computes the same of the file as onnxruntime does.

    Args:
        model: As for `export_onnx`.
        path: Likewise.
        images: Give the ranges, and the means.
        held_back: Others, on which the file is compared with single precision.
        min_agreement: Least share of these on which both must name the same class, in [0, 1].
        reduce_range: Whether weights take seven bits, so that sums of two products fit into the sixteen that CPUs
            without VNNI have for them; by default unless this CPU has VNNI. `True` makes a file for any CPU.
        **settings: As for `export_onnx`.

    Raises:
        OptionError: As `export_onnx`; or the inputs are in half precision, or `min_agreement` is given for a network
            without class scores.
        ParityError: As `export_onnx`; or the file returns values that are not finite.
        ExportError: As `export_onnx`; or onnxruntime would leave convolutions in single precision.
        AgreementError: The agreement is below `min_agreement`; no file is written.
    """
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise OptionError(f"min_agreement is {min_agreement!r}; it must lie in [0, 1]")
    target, fitted, judged = writable(path), _batches(images), _batches(held_back)
    if any(x.dtype == torch.float16 for x in fitted[0]):
        raise OptionError("int8 starts from single precision, and the inputs are in half: convert them")
    reduced = not _has_vnni() if reduce_range is None else reduce_range
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder, replacing(target) as temporary:
        single = Path(folder) / "single.onnx"
        record = export_onnx(model, single, images.example(max(BATCH_SIZES)), **settings)
        proto = onnx.load(single)
        add_biases(proto)
        rounded = _rounded(proto, Path(folder), fitted, reduce_range=reduced)
        rounded = correct_biases(rounded, proto, Path(folder), fitted)
        onnx.checker.check_model(rounded, full_check=True)
        temporary.write_bytes(rounded.SerializeToString(deterministic=True))
        convolutions = _require_fused(proto, temporary, Path(folder))
        exact, answers = (_outputs(file, judged) for file in (single, temporary))
        agreement, error, difference = _compared(exact, answers, "onnxruntime")
        _require(agreement, min_agreement, held_back.size)
        others, note = in_openvino(temporary, judged)
        elsewhere = (None, None) if others is None else _compared(answers, _joined(others), "OpenVINO")[:2]
    eight = EightBits(images.size, held_back.size, agreement, error, convolutions, reduced, *elsewhere)
    _advise(path, eight)
    return replace(
        record,
        path=os.fspath(path),
        batch_sizes=(_BATCH,),
        max_abs_diff=difference,
        tolerance=float("inf"),
        bytes=target.stat().st_size,
        int8=eight,
        runtimes=("onnxruntime",) if others is None else ("onnxruntime", "OpenVINO"),
        note=note,
    )


def _advise(path: str | os.PathLike[str], made: EightBits) -> None:
    """Warns where the file is far from single precision, or OpenVINO far from onnxruntime."""
    changed = _change(made.agreement, made.error, made.held_back)
    if changed is not None:
        logger.warning(
            "%s: eight bits change %s. Measure its accuracy before you serve it; more images may help, and where "
            "OpenVINO serves, NNCF on the file in single precision",
            path,
            changed,
        )
    changed = _change(made.openvino_agreement, made.openvino_error or 0.0, made.held_back)
    if changed is not None:
        logger.warning(
            "%s: where OpenVINO runs it in place of onnxruntime, that changes %s. Measure its accuracy there before "
            "you serve it so, or make a file for it by NNCF from the one in single precision",
            path,
            changed,
        )


def _change(agreement: float | None, error: float, images: int) -> str | None:
    """A difference in words, if it is large."""
    if agreement is None and error > _LARGE_ERROR:
        return f"the outputs by {error:.2g} of their variance"
    if agreement is not None and agreement < _LOW_AGREEMENT:
        return f"the class of {100 * (1 - agreement):.1f} % of {images} held-back images"
    return None


def _batches(images: CalibrationSet) -> Batches:
    return [flat_tensors(batch) for batch in images.batches(_BATCH)]


def _has_vnni() -> bool:
    """Whether this CPU sums products of eight bits without saturating, as far as the system tells."""
    try:
        return re.search(r"\bavx(512)?_vnni\b", _CPUINFO.read_text()) is not None
    except OSError:
        return False


def _rounded(
    single: onnx.ModelProto, folder: Path, batches: Batches, *, reduce_range: bool
) -> onnx.ModelProto:
    """The model as onnxruntime rounds it, with operator sets, format and metadata as they were."""
    names = [entry.name for entry in single.graph.input]
    feeds = (dict(zip(names, (x.numpy() for x in batch), strict=True)) for batch in batches)
    prepared, made = onnx.ModelProto(), onnx.ModelProto()
    prepared.CopyFrom(single)
    # else it advises a step for batch norms, which are folded already
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    quantize_static(
        prepared,
        folder / "rounded.onnx",
        SimpleNamespace(get_next=partial(next, feeds, None)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,  # OpenVINO refuses signed ones, and onnxruntime leaves some in float
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    made.CopyFrom(single)
    made.graph.CopyFrom(onnx.load(folder / "rounded.onnx").graph)
    return made


def _require_fused(single: onnx.ModelProto, path: Path, folder: Path) -> int:
    """The number of convolutions, once onnxruntime computes all of them in eight bits."""
    optimised = folder / "optimised.onnx"
    onnxruntime.open_session(path, device="cpu", threads=torch.get_num_threads(), optimised_to=optimised)
    kinds = Counter(node.op_type for node in onnx.load(optimised).graph.node)
    wanted: int = sum(node.op_type == "Conv" for node in single.graph.node)
    fused = kinds["QLinearConv"]
    if fused < wanted:
        raise ExportError(
            f"onnxruntime computes {fused} of {wanted} convolutions in eight bits and the others in single precision, "
            "with a conversion around each: it would hardly be faster; no file was written. Keep single precision, or "
            "try half"
        )
    return wanted


def _compared(before: list[Array], after: list[Array], runtime: str) -> tuple[float | None, float, float]:
    """Share of images of the same class, mean squared error over variance, and the largest difference."""
    differences = [y.astype(np.float64) - x.astype(np.float64) for x, y in zip(before, after, strict=True)]
    if not all(np.isfinite(one).all() for one in differences):
        raise ParityError(
            f"in eight bits the network returns values that are not finite ({runtime}); no file was written. Keep "
            "single precision",
            max_abs_diff=float("inf"),
            tolerance=float("inf"),
        )
    power = sum(float(np.square(one).sum()) for one in differences)
    spread = sum(float(np.square(x - x.mean(axis=0)).sum()) for x in before)
    scores = [class_scores(torch.from_numpy(outputs[0])) for outputs in (before, after)]
    named = [one.argmax(1) for one in scores if one is not None]
    agreement = float((named[0] == named[1]).double().mean()) if named else None
    return agreement, power / max(spread, 1e-30), max(float(np.abs(x).max()) for x in differences)


def _outputs(path: Path, batches: Batches) -> list[Array]:
    session = onnxruntime.open_session(path, device="cpu", threads=torch.get_num_threads())
    return _joined([onnxruntime.run(session, batch) for batch in batches])


def _joined(answers: list[list[Array]]) -> list[Array]:
    return [np.concatenate(column) for column in zip(*answers, strict=True)]


def _require(agreement: float | None, wanted: float | None, images: int) -> None:
    if wanted is None:
        return
    if agreement is None:
        raise OptionError("min_agreement needs a network whose output is one score for each class")
    if agreement < wanted:
        raise AgreementError(
            f"min_agreement is {wanted}, but in eight bits the network names its class in single precision on "
            f"{agreement:.3f} of {images} held-back images; no file was written. Give more images, keep single or half "
            "precision, or where OpenVINO serves try NNCF"
        )
