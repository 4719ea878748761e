"""Where adaptors go: beside the operators that write to, and read from, the residual stream that a cut touches.

PRACTISE, figure 4: operators in front of the cut get an adaptor behind them (POST), operators behind the cut get one
in front (PRE). Generically, the walk goes backward from the bypass and forward from the exit, through everything that
keeps the stream's channels (additions, normalisations, activations, pooling, depthwise convolutions, layout), and stops
at the first dense operators: the producers and consumers of the stream. An operator that cannot absorb an adaptor, such
as a depthwise convolution, is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from fxprune.errors import GraphError
from fxprune.graph import operators as ops
from fxprune.graph.extract import kept, reached
from fxprune.graph.regions import AdaptorSite, Region, Side, every_call
from fxprune.placement.dense import OperatorIndex

__all__ = ["Placement", "SiteRefusal", "find_sites"]


@dataclass(frozen=True, slots=True)
class SiteRefusal:
    """An operator beside the stream that takes no adaptor.

    Attributes:
        operator: Name of its node.
        side: Which adaptor it would have had.
        reason: Why not.
    """

    operator: str
    side: Side
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """All sites for one set of regions, and the operators refused.

    Attributes:
        sites: In graph order; each folds.
        refused: In graph order.
    """

    sites: tuple[AdaptorSite, ...]
    refused: tuple[SiteRefusal, ...]


def find_sites(gm: fx.GraphModule, regions: Sequence[Region]) -> Placement:
    """Finds the adaptor sites for dropping some regions.

    Args:
        gm: The graph before the regions are dropped.
        regions: Regions of this graph that do not overlap.

    Returns:
        Sites outside the dropped regions, in graph order.

    Raises:
        GraphError: A region does not belong to this graph.
    """
    calls = every_call(regions)
    walk = _Walk(gm, calls)
    for region in calls:
        walk.around(region)
    position = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    sites = sorted(walk.sites, key=lambda s: (position[s.operator], s.side.value))
    refused = sorted(walk.refused, key=lambda s: (position[s.operator], s.side.value))
    return Placement(tuple(sites), tuple(refused))


class _Walk:
    def __init__(self, gm: fx.GraphModule, regions: Sequence[Region]) -> None:
        self._gm = gm
        self._nodes = {node.name: node for node in gm.graph.nodes}
        missing = [n for r in regions for n in (r.entry, r.exit, r.bypass, *r.body) if n not in self._nodes]
        if missing:
            raise GraphError(
                f"regions name {missing[:5]}, which this graph does not hold; discover regions on this very graph",
                nodes=missing,
            )
        self._index = OperatorIndex(gm)
        self._bypass = {region.exit: region for region in regions}
        self._gone: set[fx.Node] = set()
        for region in regions:
            body = {self._nodes[name] for name in region.body}
            self._gone |= body.difference(kept(body, self._nodes[region.bypass]))
        self.sites: set[AdaptorSite] = set()
        self.refused: set[SiteRefusal] = set()

    def around(self, region: Region) -> None:
        """Collects the sites on both sides of one cut."""
        bypass = self._survivor(self._nodes[region.bypass])
        channels = self._channels(bypass)
        if channels is None:
            return
        self._search([bypass], channels, Side.POST)
        self._search(list(self._users(self._nodes[region.exit])), channels, Side.PRE)

    def _survivor(self, node: fx.Node) -> fx.Node:
        """Who holds a node's value once the regions, of which one may follow another, are dropped."""
        while node.name in self._bypass:
            node = self._nodes[self._bypass[node.name].bypass]
        return node

    def _channels(self, node: fx.Node) -> int | None:
        """Width of the stream: what the nearest operator that feeds it writes, else its second dimension."""
        shape = ops.shape_of(node)
        if shape is None or len(shape) < 2:
            return None
        seen: set[fx.Node] = set()
        queue = [node]
        while queue and len(seen) < 64:
            current = queue.pop(0)
            operator = self._index.writer(current)
            if operator is not None and operator.out_channels in (shape[1], shape[-1]):
                return operator.out_channels
            if operator is None and current not in seen:
                seen.add(current)
                queue.extend(current.all_input_nodes)
        return shape[1]

    def _search(self, start: list[fx.Node], channels: int, side: Side) -> None:
        """Walks the stream from `start`: toward its producers for POST, toward its consumers for PRE."""

        def onward(node: fx.Node) -> Iterable[fx.Node]:
            if node.op in ("placeholder", "get_attr", "output"):
                return ()
            operator = self._index.writer(node) if side is Side.POST else self._index.get(node.name)
            if operator is not None:
                width = operator.out_channels if side is Side.POST else operator.in_channels
                several = side is Side.PRE and len(set(operator.data)) > 1
                if width != channels or several:
                    return ()
                if not operator.refusal:
                    self.sites.add(AdaptorSite(operator.node, side, channels, operator.channel_dim))
                    return ()
                self.refused.add(SiteRefusal(operator.node, side, operator.refusal))
                if operator.groups == 1:
                    return ()
            carries = ops.tensor_meta(node) is None or channels in (ops.shape_of(node) or ())
            if not carries:
                return ()
            return self._sources(node) if side is Side.POST else self._users(node)

        reached(start, onward)

    def _users(self, node: fx.Node) -> Iterator[fx.Node]:
        """Users of a node once the regions are dropped: a dropped region passes its bypass on."""
        for user in node.users:
            if user not in self._gone:
                yield user
        for region in self._bypass.values():
            if region.bypass == node.name:
                yield from self._users(self._nodes[region.exit])

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Inputs of a node that carry the stream, once the regions are dropped."""
        shape = ops.shape_of(node)
        for source in node.all_input_nodes:
            source = self._survivor(source)
            if len(node.all_input_nodes) == 1 or ops.shape_of(source) == shape or shape is None:
                yield source
