"""From labels and plans to the regions of the graph at hand."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import combinations

from torch import fx

from fxprune.errors import OptionError
from fxprune.graph import operators as ops
from fxprune.graph.regions import Discovery, Region
from fxprune.plan import Plan, PlannedCut

__all__ = ["plan_of", "planned_regions", "regions_named"]


def plan_of(regions: Sequence[Region], kinds: Sequence[str], inputs: object) -> Plan:
    """The plan that cuts these regions; the other arguments are those of `Plan`."""
    cuts = [PlannedCut(r.label, r.kind.value, r.shape[1:], r.modules) for r in regions]
    return Plan(tuple(cuts), tuple(kinds), inputs)


def regions_named(
    labels: Sequence[str], found: Discovery, *, by: str = "regions", advice: str = ""
) -> tuple[Region, ...]:
    """The regions of these labels, in graph order.

    Args:
        labels: What to look for.
        found: Where.
        by: Who names them, for messages.
        advice: What else may be the matter where a label is unknown.

    Raises:
        OptionError: A label names no region, with the reason where what it names was refused; or two overlap.
    """
    known = {region.label for region in found.regions}
    reasons = {rejection.label: rejection.detail for rejection in found.rejections}
    for label in labels:
        if label in reasons and label not in known:
            raise OptionError(f"{by} names {label}, which cannot be cut: {reasons[label]}")
        if label not in known:
            near = difflib.get_close_matches(label, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(sorted(known))}"
            raise OptionError(f"{by} names {label}, and no region is called that; {hint}{advice}")
    chosen = tuple(region for region in found.regions if region.label in labels)
    for one, other in combinations(chosen, 2):
        if one.overlaps(other):
            raise OptionError(f"{by} names {one.label} and {other.label}, which overlap: give one of them")
    return chosen


def planned_regions(plan: Plan, gm: fx.GraphModule, found: Discovery) -> tuple[Region, ...]:
    """The regions that a plan means, in graph order.

    Args:
        plan: What to cut.
        gm: The graph.
        found: What discovery says of it, for the plan's kinds.

    Raises:
        OptionError: A block is missing, cannot be cut, or is of another kind or shape; the message names it.
    """
    present = {ops.module_path(node) for node in gm.graph.nodes}
    labels = {_label_here(cut, found.regions, present): cut for cut in plan.cuts}
    lost = (
        ". A pass that traces a graph again (torch's fuse without no_trace=True) forgets which module an operator came "
        "from: run such a pass after the cut"
    )
    chosen = regions_named(list(labels), found, by="the plan", advice=lost)
    for region in chosen:
        cut = labels[region.label]
        here, there = (region.kind.value, region.shape[1:]), (cut.kind, cut.shape)
        if here != there:
            raise OptionError(
                f"the plan names {cut.label}, {_words(*there)}, which here is {_words(*here)}: give the network that "
                "the plan was made for, at that size of image, or name the blocks to cut by regions="
            )
    return chosen


def _label_here(cut: PlannedCut, regions: Sequence[Region], present: set[str]) -> str:
    """What a planned block is called in this graph.

    Tracing a graph again forgets the scope of functions, and with it some labels. The block is then the one whose
    operators are those that the plan lists, less what other passes have folded away since.
    """
    if all(region.label != cut.label for region in regions):
        left = {module for module in cut.modules if module in present}
        for region in regions:
            if left and left == set(region.modules):
                return region.label
    return cut.label


def _words(kind: str, shape: Sequence[int]) -> str:
    article = "an" if kind.startswith("i") else "a"
    return f"{article} {kind} region of shape {list(shape)}"
