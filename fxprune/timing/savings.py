"""Latency that each region is worth, by running the network without it (PRACTISE, eq. 2).

A single region may be worth a hundredth of the latency, less than a quiet machine's noise. Where several regions are
equal, the network is timed without all of them, and each is worth an equal share: the difference is larger by their
number, the noise is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from fxprune.graph import operators as ops
from fxprune.graph.extract import share
from fxprune.graph.regions import Region
from fxprune.measurements import Interval, LatencyComparison
from fxprune.passes import DropRegions
from fxprune.timing.latency import TimingSettings

__all__ = ["SCORING", "measure_savings", "signature", "without"]

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
    measure: Callable[[Sequence[Sequence[Region]]], Sequence[LatencyComparison]],
) -> tuple[LatencyComparison, ...]:
    """What each region saves; those of one signature (the same operators on the same shapes) share what they save.

    Args:
        gm: The original.
        regions: What to leave out.
        measure: Times the network without each of some sets of regions against the original, all in turns.

    Returns:
        One comparison for each region; `shared_by` says how many were left out together.
    """
    keys = [signature(gm, region) for region in regions]
    groups: dict[tuple[str, ...], list[Region]] = {}
    for key, region in zip(keys, regions, strict=True):
        groups.setdefault(key, []).append(region)
    measured = dict(zip(groups, measure(list(groups.values())), strict=True))
    return tuple(_share(measured[key], len(groups[key])) for key in keys)


def signature(gm: fx.GraphModule, region: Region) -> tuple[str, ...]:
    """What a region costs, as a key: operators, their settings and the shapes they work on, in graph order."""
    body = region.whole_body
    return (
        region.kind.value,
        *(_describe(gm, n) for n in gm.graph.nodes if n.name in body and n.op != "get_attr"),
    )


def _describe(gm: fx.GraphModule, node: fx.Node) -> str:
    module = ops.module_of(gm, node)
    settings = ops.op_name(gm, node) if module is None else repr(module)
    if module is None and not node.all_input_nodes:
        settings += str([str(a) for a in node.args if isinstance(a, (int, float, bool, str, tuple, list))])
    inputs = " ".join(str(ops.shape_of(source)) for source in node.all_input_nodes)
    return f"{settings} {inputs} -> {ops.shape_of(node)}"


def _share(measured: LatencyComparison, regions: int) -> LatencyComparison:
    """What one of several equal regions is worth, measured without all of them."""

    def part(ratio: float) -> float:
        return 1.0 - (1.0 - ratio) / regions

    interval = Interval(part(measured.interval.low), part(measured.interval.high), measured.interval.level)
    return replace(measured, ratio=part(measured.ratio), interval=interval, shared_by=regions)
