"""A candidate cut down to what its adaptors change: from its frontier over its waist to the tap."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import fx

from fxprune.calibration.rows import Rows
from fxprune.discovery.dominance import Dominance, flow_nodes
from fxprune.graph.extract import ancestors, between, descendants, exits, is_returned
from fxprune.graph.regions import Side, every_call
from fxprune.passes import FoldBatchNorm
from fxprune.placement.dense import OperatorIndex
from fxprune.recovery.adaptors import Candidate, adaptor_weights
from fxprune.recovery.features import exit_of, feature_loss
from fxprune.scoring.activations import Activations, memory_of

__all__ = ["ChangedPart"]


class ChangedPart:
    """A candidate cut down to what its adaptors change.

    Args:
        gm: The original, with shapes.
        candidate: Of it.
        index: Of its operators.
        rows: The values that have a batch dimension.
        waists: Where the waist may be; without, see there.

    Attributes:
        frontier: Values that the changed part reads, the same in the original, and that can be told apart by image:
            those with a batch dimension, and the network's inputs. Sizes and constants are computed anew.
        part: From the frontier to the tap, with the frozen batch norms folded, for each would cost two passes over its
            feature maps at every step.
        waist: The first value behind all adaptors and cuts that everything they change goes through on its way to the
            tap, and that is among `waists` or no larger than the frontier's, if that is not the tap itself; empty where
            there is none. The names are those of the original, which has a region's exit where the candidate has its
            bypass.
        far: Whether the waist is another one, because the tap is what the network returns, which may be large and far
            behind the cuts: all values that are read elsewhere of what lies between adaptors and cuts.
        to_waist: From the frontier to the waist, with the same adaptors; `part` where there is no waist.
        targets: Name of the node that each PRE operator read in the original, by operator.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        candidate: Candidate,
        index: OperatorIndex,
        rows: Mapping[str, Rows],
        waists: Collection[str] = (),
    ) -> None:
        self.candidate = candidate
        flow = flow_nodes(gm)
        nodes = {node.name: node for node in candidate.graph.graph.nodes}
        bypasses = [nodes[region.bypass] for region in candidate.regions if region.bypass in nodes]
        below = [user.name for bypass in bypasses for user in bypass.users if user.op != "output"]
        sources = [*candidate.adaptor_nodes(), *below]  # whoever reads another value than in the original
        changed = descendants(candidate.graph, sources)
        known = {*rows, *(name for name, node in nodes.items() if node.op == "placeholder")} - changed
        needed = ancestors(candidate.graph, candidate.tap, known)
        self.frontier = [name for name in nodes if name in known and name in needed]
        self.part = between(candidate.graph, self.frontier, list(candidate.tap))
        given = waists
        if not waists:
            largest = max((memory_of(nodes[name]) for name in self.frontier), default=0)
            waists = {name for name in rows if memory_of(flow[name]) <= largest}
        waist = _several(self.part, candidate, given or rows.keys()) if is_returned(gm, candidate.tap) else {}
        self.far = bool(waist)
        waist = waist or _waist(self.part, candidate, sources, waists)
        self.waist = tuple(waist.values())
        self.to_waist = self.part
        if waist:
            self.to_waist = between(candidate.graph, self.frontier, list(waist))
            FoldBatchNorm()(self.to_waist)
        FoldBatchNorm()(self.part)
        gone = {n for r in candidate.regions for n in r.body if n not in nodes and n != r.exit}
        reads = {s.operator: index[s.operator].data[0] for s in candidate.adaptors if s.side is Side.PRE}
        self.targets: Mapping[str, str] = {
            operator: name for operator, name in reads.items() if name not in gone and name in rows
        }

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the original's values that fitting needs, those at the tap apart."""
        return (*self.frontier, *self.targets.values(), *self.waist)

    def loss(self, cache: Activations, tap: Sequence[str], images: int) -> float:
        """Mean squared error at the tap over the first cached images, few at a time: others may be at work beside."""
        total = 0.0
        for start in range(0, images, 16):
            stop = min(start + 16, images)
            features = self.part(*(cache.first(name, stop, start) for name in self.frontier))
            wanted = [cache.first(name, stop, start) for name in tap]
            total += float(feature_loss(features, wanted)) * (stop - start)
        return total / images


def _waist(
    part: fx.GraphModule, candidate: Candidate, sources: Sequence[str], allowed: Collection[str]
) -> dict[str, str]:
    """The one value of `ChangedPart.waist`, in both graphs' names; where a cut reaches the tap there is none."""
    if any(region.bypass in candidate.tap for region in candidate.regions):
        return {}
    flow = flow_nodes(part)
    dominance = Dominance(flow)
    changes = [name for name in sources if name in flow]
    for name in flow:
        if name in candidate.tap:
            return {}
        if name in allowed and all(dominance.post_dominates(name, change) for change in changes):
            return {name: name}
    return {}


def _several(part: fx.GraphModule, candidate: Candidate, allowed: Collection[str]) -> dict[str, str]:
    """The values of `ChangedPart.waist` where they may be several; none where an adaptor would not be seen there."""
    nodes = {node.name: node for node in part.graph.nodes}
    adaptors = [name for name in candidate.adaptor_nodes() if name in nodes]
    # in the original nothing is called as an adaptor is: whoever reads one stands for it
    readers = [user.name for name in adaptors for user in nodes[name].users if user.op != "output"]
    bypasses = [region.bypass for region in every_call(candidate.regions) if region.bypass in nodes]
    names = {name: exit_of(candidate.regions, name) for name in exits(part, [*adaptors, *readers, *bypasses])}
    found = {name: original for name, original in names.items() if original in allowed}
    inputs = [node.name for node in part.graph.find_nodes(op="placeholder")]
    seen = adaptor_weights(between(part, inputs, list(found)))
    return found if set(seen) == set(adaptor_weights(part)) else {}
