"""Where candidates lie in a network: enough to draw it in stages, without its graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxprune.graph import operators as ops
from fxprune.graph.regions import Discovery, Reason

__all__ = ["Place", "layout"]


@dataclass(frozen=True, slots=True)
class Place:
    """One candidate of a network: a region, or what was refused outside of all regions.

    Attributes:
        label: Its name.
        shape: Of the value that it ends in, batch excluded; empty where that is not one tensor.
        inside: Labels of the regions that contain it.
        refused: Why it cannot be cut; None for a region.
    """

    label: str
    shape: tuple[int, ...]
    inside: tuple[str, ...]
    refused: Reason | None


def layout(graph: fx.GraphModule, found: Discovery) -> tuple[Place, ...]:
    """The candidates of a graph, in the order of their ends; what lies inside another comes before it.

    Args:
        graph: The network, with shapes.
        found: What discovery says of it.
    """
    nodes = {node.name: (i, ops.shape_of(node) or ()) for i, node in enumerate(graph.graph.nodes)}
    places: list[tuple[int, int, Place]] = []
    for region in found.regions:
        body = set(region.body)
        around = tuple(other.label for other in found.regions if body < set(other.body))
        place = Place(region.label, region.shape[1:], around, None)
        places.append((nodes[region.exit][0], len(body), place))
    covered = {name for region in found.regions for name in region.body}
    for refused in found.rejections:
        if refused.exit not in covered:
            end, shape = nodes[refused.exit]
            places.append((end, 0, Place(refused.label or refused.exit, shape[1:], (), refused.reason)))
    return tuple(place for _, _, place in sorted(places, key=lambda entry: entry[:2]))
