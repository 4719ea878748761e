"""Whether an ONNX file computes what the network does: in onnxruntime, as written and as optimised."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import nn

from fxprune.errors import ExportError, MeasurementError, ParityError
from fxprune.export import serving
from fxprune.export.messages import innermost
from fxprune.export.running import refusal, run, tensors_of
from fxprune.graph.call import Inputs

__all__ = ["BATCH_SIZES", "compare", "resized"]

BATCH_SIZES = (1, 2, 7)
_TOLERANCE = 1e-4
_TOLERANCE_HALF = 5e-3


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
) -> tuple[float, float]:
    """The largest absolute difference between file and network, and the acceptable one.

    Both run at several batch sizes, the file without onnxruntime's optimisations and with all of them.

    Args:
        network: In evaluation mode, on the CPU.
        path: The file.
        examples: Inputs for it; where there are enough, they are used as they are.
        tolerance: The acceptable difference, if it is not to follow from the outputs.

    Raises:
        ExportError: onnxruntime cannot load or run the file.
        ParityError: They differ by more than is acceptable.
    """
    half_inputs = any(x.dtype == torch.float16 for x in examples.tensors())
    try:
        sessions = {
            how: serving.open_session(
                path, device="cpu", threads=torch.get_num_threads(), half=half_inputs, optimised=optimised
            )
            for how, optimised in (("unoptimised", False), ("optimised", True))
        }
    except MeasurementError as error:
        raise ExportError(f"the ONNX file cannot be verified, no file was written: {error}") from error
    worst, where, scale, half = 0.0, "", 1.0, False
    for batch in BATCH_SIZES:
        rows = resized(examples, batch, seed=batch)
        expected = [x.numpy() for x in tensors_of(run(network, rows))]
        half = half or any(x.dtype == np.float16 for x in expected)
        # NaN spreads through max() of an array, though not through the built-in one.
        scale = float(np.max([scale, *(_largest(x) for x in expected)]))
        for how, session in sessions.items():
            try:
                actual = serving.run(session, rows.tensors())
            except MeasurementError as error:
                raise refusal(network, innermost(error)) from error
            here = f"batch size {batch}, onnxruntime {how}"
            shapes = [x.shape for x in expected], [x.shape for x in actual]
            if shapes[0] != shapes[1]:
                raise ParityError(
                    f"the ONNX file returns shapes {shapes[1]}, torch {shapes[0]} ({here}); no file was written",
                    max_abs_diff=float("inf"),
                    tolerance=tolerance or 0.0,
                )
            difference = float(np.max([_largest(x, y) for x, y in zip(expected, actual, strict=True)]))
            if not difference <= worst and not np.isnan(worst):
                worst, where = difference, here
    accepted = tolerance if tolerance is not None else (_TOLERANCE_HALF if half else _TOLERANCE) * scale
    if not worst <= accepted:
        raise ParityError(
            f"the ONNX file disagrees with torch by {worst:.3g} where {accepted:.3g} is acceptable ({where}); no file "
            "was written. Give tolerance= if that is harmless for you",
            max_abs_diff=worst,
            tolerance=accepted,
        )
    return worst, accepted


def _largest(x: serving.Array, minus: serving.Array | float = 0.0) -> float:
    return float(np.abs(x.astype(np.float64) - np.asarray(minus, np.float64)).max(initial=0.0))
