"""Cuts regions out of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.errors import GraphError, PreconditionError
from fxprune.graph import operators as ops
from fxprune.graph import vocabulary
from fxprune.graph.regions import Region, every_call
from fxprune.passes.base import FxPass

__all__ = ["DropRegions", "dropped_labels"]

_DROPPED = "fxprune_dropped"


def dropped_labels(gm: fx.GraphModule) -> frozenset[str]:
    """Labels of the regions that were dropped from a graph."""
    return frozenset(label for label, _ in gm.meta.get(_DROPPED, ()))


class DropRegions(FxPass):
    """Replaces each region's exit by its bypass and removes what nobody reads any more.

    ```
    entry ─┬─ conv ─ bn ─ relu ─ conv ─ bn ─ add ─ relu ─ next          entry ─ next
           └──────────────────────────────────┘                  =>
    ```

    1. The exit's users read the bypass instead.
    2. Where one of them changes its input in place and the bypass is read elsewhere too, they read a clone: the exit
       was a tensor of its own.

    Args:
        regions: Regions of the graph that the pass is given; no two may overlap.

    Raises:
        PreconditionError: Two regions overlap.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = every_call(regions)
        for first, second in combinations(regions, 2):
            if first.overlaps(second):
                raise PreconditionError(f"regions {first.label} and {second.label} overlap; drop one of them")

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every region must lie in this graph, or have been dropped from it already."""
        names = {node.name for node in graph_module.graph.nodes}
        for region in self.pending(graph_module):
            named = dict.fromkeys((region.entry, region.bypass, *region.body))
            missing = [name for name in named if name not in names]
            if missing:
                raise GraphError(
                    f"region {region.label} names nodes that this graph does not hold ({', '.join(missing[:4])}); "
                    "discover the regions on this very graph",
                    nodes=missing,
                )

    def pending(self, graph_module: fx.GraphModule) -> list[Region]:
        """The regions that were not dropped from this graph yet."""
        done = graph_module.meta.get(_DROPPED, frozenset())
        return [region for region in self._regions if (region.label, region.exit) not in done]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Drops every region that is still there."""
        pending = self.pending(graph_module)
        nodes = {node.name: node for node in graph_module.graph.nodes}
        order = {name: i for i, name in enumerate(nodes)}
        owners: set[str] = set()
        for region in sorted(pending, key=lambda r: order[r.exit]):  # a bypass may be an exit dropped before
            owners.update(_owner(nodes[name]) for name in region.body)
            _drop(graph_module, region, nodes)
        if pending:
            done = graph_module.meta.get(_DROPPED, frozenset())
            graph_module.meta[_DROPPED] = done | {(region.label, region.exit) for region in pending}
            _delete_unread(graph_module, owners)
        return PassResult(graph_module, bool(pending))


def _drop(gm: fx.GraphModule, region: Region, nodes: dict[str, fx.Node]) -> None:
    exit_, bypass = nodes[region.exit], nodes[region.bypass]
    body = {nodes[name] for name in region.body}
    outside = [user for user in bypass.users if user not in body]
    stand_in = bypass
    if (outside or bypass.op in ("placeholder", "get_attr")) and (  # case 2
        _changes(gm, exit_, exit_.users) or _changes(gm, bypass, outside)
    ):
        with gm.graph.inserting_after(exit_):
            stand_in = gm.graph.call_method("clone", (bypass,))
        stand_in.meta = dict(exit_.meta)
        nodes[stand_in.name] = stand_in
    exit_.replace_all_uses_with(stand_in)  # case 1
    for name in reversed(region.body):
        if not nodes[name].users:
            gm.graph.erase_node(nodes[name])
            if region.exit == name:
                nodes[name] = stand_in  # a region that begins where this one ended now begins at the stand-in


def _owner(node: fx.Node) -> str:
    """Path of the module whose parameters a node holds or calls, "" for other nodes."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""


def _delete_unread(gm: fx.GraphModule, owners: set[str]) -> None:
    """Deletes those modules that no node reads any more, and what they leave empty.

    torch's `delete_all_unused_submodules` visits every module of the network, which takes longer than the dropping.
    """
    read = {f"{node.target}." for node in gm.graph.nodes if node.op in ("call_module", "get_attr")}

    def is_read(path: str) -> bool:
        return any(name.startswith(path) or path.startswith(name) for name in read)

    for path in sorted(owners):
        while path and not is_read(f"{path}."):
            gm.delete_submodule(path)
            path = path.rpartition(".")[0]


def _changes(gm: fx.GraphModule, tensor: fx.Node, users: Iterable[fx.Node]) -> bool:
    """Whether one of the users changes the tensor in place, directly or through a view."""

    def shares(node: fx.Node) -> bool:
        return ops.is_identity(gm, node) or ops.op_name(gm, node) in vocabulary.LAYOUT

    return any(
        ops.mutated_input(gm, user) is tensor or (shares(user) and _changes(gm, user, user.users))
        for user in users
    )
