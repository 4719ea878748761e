"""Calls of the same weights made one region: an encoder that two images share is cut in all its calls or in none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter

from torch import fx

from fxprune.graph import operators as ops
from fxprune.graph.extract import descendants
from fxprune.graph.regions import Region

__all__ = ["tied"]


def tied(gm: fx.GraphModule, regions: Sequence[Region]) -> list[Region]:
    """The regions, those that drop the very same weights side by side made one, labelled `...#all`.

    Where one follows the other they stay apart: they are the turns of a loop, and fewer turns are a network too.

    Args:
        gm: The graph.
        regions: Of it, in graph order.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    groups: dict[object, list[list[Region]]] = {}
    for region in regions:
        weights = frozenset(weight for name in region.body for weight in _weights(gm, nodes[name]))
        sets = groups.setdefault((region.kind, weights), [])
        beside = next((one for one in sets if not _follows(gm, one, region)), None)
        if beside is None:
            sets.append([region])
        else:
            beside.append(region)
    calls = {one[0]: tuple(one[1:]) for sets in groups.values() for one in sets if len(one) > 1}
    twins = {twin for others in calls.values() for twin in others}
    return [
        replace(region, label=f"{region.label}#all", twins=calls[region]) if region in calls else region
        for region in regions
        if region not in twins
    ]


def _weights(gm: fx.GraphModule, node: fx.Node) -> Iterator[int]:
    """Identities of the parameters that a node computes with."""
    module = ops.module_of(gm, node)
    if module is not None:
        yield from map(id, module.parameters())
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            yield id(attrgetter(str(source.target))(gm))


def _follows(gm: fx.GraphModule, calls: Sequence[Region], region: Region) -> bool:
    """Whether a region comes after one of some others, or lies within it."""
    behind = descendants(gm, [name for call in calls for name in (*call.body, call.exit)])
    return region.exit in behind
