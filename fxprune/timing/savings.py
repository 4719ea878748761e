"""Latency that each region is worth, by running the network without it (PRACTISE, eq. 2).

A single region may be worth a hundredth of the latency, less than a quiet machine's noise. Where several regions are
equal, the network is timed without all of them, and each is worth an equal share: the difference is larger by their
number, the noise is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, fx, nn

from fxprune.graph.extract import share
from fxprune.graph.regions import Region
from fxprune.measurements import Interval, LatencyComparison
from fxprune.passes import DropRegions
from fxprune.timing.latency import TimingSettings, compare
from fxprune.timing.signature import signature

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
) -> tuple[LatencyComparison, ...]:
    """Times the network without its regions against the original, in one interleaved run.

    Regions of one signature (the same operators on the same shapes) are left out together, and share the saving.

    Args:
        gm: The original, on `device`.
        regions: What to leave out.
        inputs: A batch of inputs, in the order that `wrap`'s result takes them.
        wrap: Makes a network callable with positional tensors.
        backend: Where to time: `torch`, `onnxruntime-cpu` or `onnxruntime-cuda`.
        device: Device of the `torch` backend.
        settings: How long to go on.

    Returns:
        One comparison for each region; `shared_by` says how many were left out together.

    Raises:
        MeasurementError: The backend cannot run the network.
        DeviceError: The device is not there.
    """
    keys = [signature(gm, region) for region in regions]
    groups: dict[tuple[str, ...], list[Region]] = {}
    for key, region in zip(keys, regions, strict=True):
        groups.setdefault(key, []).append(region)
    subjects = [wrap(without(gm, group)) for group in groups.values()]
    place = device if backend == "torch" else None
    measured = compare(wrap(gm), subjects, inputs, backend=backend, device=place, settings=settings)
    shares = {
        key: _share(one, len(group)) for (key, group), one in zip(groups.items(), measured, strict=True)
    }
    return tuple(shares[key] for key in keys)


def _share(measured: LatencyComparison, regions: int) -> LatencyComparison:
    """What one of several equal regions is worth, measured without all of them."""

    def part(ratio: float) -> float:
        return 1.0 - (1.0 - ratio) / regions

    interval = Interval(part(measured.interval.low), part(measured.interval.high), measured.interval.level)
    return replace(measured, ratio=part(measured.ratio), interval=interval, shared_by=regions)
