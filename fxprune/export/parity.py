"""Whether an ONNX file computes what the network does: in onnxruntime, as written and as optimised, and in OpenVINO."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fxprune.errors import DeviceError, ExportError, MeasurementError, ParityError
from fxprune.export.messages import innermost
from fxprune.export.running import refusal, run, tensors_of
from fxprune.graph.call import Inputs
from fxprune.runtimes import onnxruntime, openvino
from fxprune.runtimes.feeds import Array

__all__ = ["BATCH_SIZES", "Parity", "compare", "in_openvino", "resized"]

BATCH_SIZES = (1, 2, 7)
_TOLERANCE, _TOLERANCE_HALF = 1e-4, 5e-3
"""Of the largest output, or of the least that it is taken for."""
_LEAST, _LEAST_HALF = 1e-2, 1.0  # probabilities of many classes are small


@dataclass(frozen=True, slots=True)
class Parity:
    """What comparing a file with its network came to.

    Attributes:
        max_abs_diff: The largest absolute difference.
        tolerance: The largest that would have been accepted.
        runtimes: What the file was run in.
        note: Why it was not run in OpenVINO, if it was not.
    """

    max_abs_diff: float
    tolerance: float
    runtimes: tuple[str, ...]
    note: str | None


def resized(examples: Inputs, batch: int, *, seed: int) -> Inputs:
    """The first examples, where there are enough; else rows of them repeated in a drawn order, with a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def resize(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] >= batch:
            return x[:batch].clone()
        order = torch.randperm(batch, generator=generator) % x.shape[0]
        rows = x[order].clone()
        if rows.is_floating_point():
            noise = torch.randn(rows.shape, generator=generator).to(rows.dtype)
            rows += 0.01 * rows.std(correction=0) * noise
        return rows

    return examples.map(resize)


def compare(
    network: nn.Module, path: str | os.PathLike[str], examples: Inputs, tolerance: float | None
) -> Parity:
    """Runs a file and its network at several batch sizes.

    The file runs in onnxruntime, without its optimisations and with all of them, and in OpenVINO where that is
    installed and knows the file's operators.

    Args:
        network: In evaluation mode, on the CPU.
        path: The file.
        examples: Inputs for it; where there are enough, they are used as they are.
        tolerance: The acceptable difference, if it is not to follow from the outputs.

    Raises:
        ExportError: onnxruntime cannot load or run the file.
        ParityError: They differ by more than is acceptable.
    """
    batches = [resized(examples, batch, seed=batch) for batch in BATCH_SIZES]
    expected = [[x.numpy() for x in tensors_of(run(network, rows))] for rows in batches]
    answers = _in_onnxruntime(network, path, batches)
    others, note = in_openvino(path, [rows.tensors() for rows in batches])
    if others is not None:
        answers["OpenVINO"] = others
    flat = [x for result in expected for x in result]
    half = any(x.dtype == np.float16 for x in flat)
    share, least = (_TOLERANCE_HALF, _LEAST_HALF) if half else (_TOLERANCE, _LEAST)
    # NaN spreads through max() of an array, though not through the built-in one.
    scale = float(np.max([least, *map(_largest, flat)]))
    worst, where = 0.0, ""
    for place, (batch, mine) in enumerate(zip(BATCH_SIZES, expected, strict=True)):
        for runtime, results in answers.items():
            theirs, here = results[place], f"batch size {batch}, {runtime}"
            shapes = [x.shape for x in mine], [x.shape for x in theirs]
            if shapes[0] != shapes[1]:
                raise ParityError(
                    f"the ONNX file returns shapes {shapes[1]}, torch {shapes[0]} ({here}); no file was written",
                    max_abs_diff=float("inf"),
                    tolerance=tolerance or 0.0,
                )
            difference = float(np.max([_largest(x, y) for x, y in zip(mine, theirs, strict=True)]))
            if not difference <= worst and not np.isnan(worst):
                worst, where = difference, here
    accepted = tolerance if tolerance is not None else share * scale
    if not worst <= accepted:
        raise ParityError(
            f"the ONNX file disagrees with torch by {worst:.3g} where {accepted:.3g} is acceptable ({where}); no file "
            "was written. Give tolerance= if that is harmless for you",
            max_abs_diff=worst,
            tolerance=accepted,
        )
    return Parity(worst, accepted, tuple(answers), note)


def _in_onnxruntime(
    network: nn.Module, path: str | os.PathLike[str], batches: Sequence[Inputs]
) -> dict[str, list[list[Array]]]:
    """What the file answers for each batch, as written and optimised."""
    half = any(x.dtype == torch.float16 for x in batches[0].tensors())
    answers = {}
    for how, optimised in (("unoptimised", False), ("optimised", True)):
        try:
            session = onnxruntime.open_session(
                path, device="cpu", threads=torch.get_num_threads(), half=half, optimised=optimised
            )
        except MeasurementError as error:
            raise ExportError(f"the ONNX file cannot be verified, no file was written: {error}") from error
        try:
            results = [onnxruntime.run(session, rows.tensors()) for rows in batches]
        except MeasurementError as error:
            raise refusal(network, innermost(error)) from error
        answers[f"onnxruntime {how}"] = results
    return answers


def in_openvino(
    path: str | os.PathLike[str], batches: Sequence[Sequence[torch.Tensor]]
) -> tuple[list[list[Array]] | None, str | None]:
    """What OpenVINO answers for each batch; None, and why, where it is missing or cannot run the file."""
    try:
        session = openvino.open_session(path, threads=torch.get_num_threads())
        return [openvino.run(session, batch) for batch in batches], None
    except (DeviceError, MeasurementError) as error:
        return None, f"not checked in OpenVINO: {error}"


def _largest(x: Array, minus: Array | float = 0.0) -> float:
    return float(np.abs(x.astype(np.float64) - np.asarray(minus, np.float64)).max(initial=0.0))
