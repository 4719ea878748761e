"""Latency that each region is worth, by running the network without it (PRACTISE, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx, nn

from fxprune.deploy.latency import TimingSettings, compare
from fxprune.graph.extract import share
from fxprune.graph.regions import Region
from fxprune.graph.signature import signature
from fxprune.passes import DropRegions
from fxprune.records import LatencyComparison

__all__ = ["SCORING", "measure_savings", "without"]

SCORING = TimingSettings(
    warmup=2, min_rounds=10, max_rounds=500, max_seconds=120.0, half_width=0.006, relative=0.06
)
"""Close enough that repeated runs choose the same set; with a quarter of the saving they did not always."""


def without(gm: fx.GraphModule, regions: Sequence[Region]) -> fx.GraphModule:
    """The network without some regions, sharing its weights."""
    copy = share(gm)
    DropRegions(regions)(copy)
    return copy


def measure_savings(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    inputs: Sequence[Tensor],
    wrap: Callable[[fx.GraphModule], nn.Module],
    *,
    backend: str,
    device: str,
    settings: TimingSettings = SCORING,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LatencyComparison, ...]:
    """Times the network without each region against the original, in one interleaved run.

    Regions of one signature (the same operators on the same shapes) are timed once.

    Args:
        gm: The original, on `device`.
        regions: What to leave out, one at a time.
        inputs: A batch of inputs, in the order that `wrap`'s result takes them.
        wrap: Makes a network callable with positional tensors.
        backend: Where to time: `torch`, `onnxruntime-cpu` or `onnxruntime-cuda`.
        device: Device of the `torch` backend.
        settings: How long to go on.
        progress: Called with rounds done and the most there will be.

    Returns:
        One comparison for each region.

    Raises:
        MeasurementError: The backend cannot run the network.
        DeviceError: The device is not there.
    """
    keys = [signature(gm, region) for region in regions]
    representatives = dict(zip(reversed(keys), reversed(regions), strict=True))
    subjects = [wrap(without(gm, [region])) for region in representatives.values()]
    place = device if backend == "torch" else None
    measured = compare(
        wrap(gm), subjects, inputs, backend=backend, device=place, settings=settings, progress=progress
    )
    by_key = dict(zip(representatives, measured, strict=True))
    return tuple(by_key[key] for key in keys)
