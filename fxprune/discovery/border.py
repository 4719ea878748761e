"""Where a region ends: its body, and the edges that would cross its border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from fxprune.discovery.dominance import Dominance
from fxprune.graph import operators as ops
from fxprune.graph.extract import reached
from fxprune.graph.regions import Reason
from fxprune.tracing.mutation import base_of

__all__ = ["Border", "Refusal"]


class Refusal(NamedTuple):
    """Why a candidate is no region: a reason, a sentence, the nodes that show it (by default the join)."""

    reason: Reason
    detail: str
    nodes: tuple[str, ...] = ()


class Border:
    """Answers questions about subgraphs between an entry and an exit.

    Args:
        gm: The graph module.
        flow: Its tensor flow, from `flow_nodes`.
        dominance: Dominators over that flow.
    """

    def __init__(self, gm: fx.GraphModule, flow: dict[str, fx.Node], dominance: Dominance) -> None:
        self._gm = gm
        self._flow = flow
        self._dominance = dominance
        self._position = {node: i for i, node in enumerate(gm.graph.nodes)}

    def body(self, entry: fx.Node, exit_: fx.Node) -> list[fx.Node]:
        """Nodes from which `exit_` is computed without passing `entry`, in graph order.

        Sizes and parameters that nothing else needs belong to the body too.
        """
        inside = set(
            reached(
                [exit_],
                lambda node: [s for s in node.all_input_nodes if s is not entry and s.name in self._flow],
            )
        )
        self._add_private_sources(inside)
        return sorted(inside, key=self._position.__getitem__)

    def _add_private_sources(self, inside: set[fx.Node]) -> None:
        stack = list(inside)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in inside or source.name in self._flow or source.op == "placeholder":
                    continue
                if all(user in inside for user in source.users):
                    inside.add(source)
                    stack.append(source)

    def crossing(self, entry: fx.Node, exit_: fx.Node, body: Sequence[fx.Node]) -> Refusal | None:
        """The first edge that forbids dropping the body; None without one."""
        inside = set(body)
        fed = next((node.name for node in body if node.op == "placeholder"), None)
        if fed is not None:
            return Refusal(Reason.FED_FROM_OUTSIDE, f"input {fed} enters beside {entry.name}", (fed,))
        for node in body:
            outside = [user for user in node.users if user not in inside] if node is not exit_ else []
            leak = self._leak(node, exit_, outside, inside) if outside else None
            if leak is not None:
                return leak
            if ops.mutated_input(self._gm, node) is not None and self._reaches(node, entry):
                detail = f"{node.name} changes {entry.name} in place"
                return Refusal(Reason.MUTATED_ENTRY, detail, (node.name, entry.name))
        return None

    def _leak(
        self, node: fx.Node, exit_: fx.Node, outside: Sequence[fx.Node], inside: set[fx.Node]
    ) -> Refusal | None:
        """Who outside needs the node's tensor, or computes with a size (or another non-tensor) of it, if anybody."""
        witness = next((user for user in outside if user.name in self._flow), None)
        bound = node.name not in self._flow or self._dominance.post_dominates(exit_.name, node.name)
        if witness is not None and not bound and self._dominance.is_live(witness.name):
            sentence = f"{node.name} is used by {witness.name}"
            return Refusal(Reason.USED_OUTSIDE, sentence, (node.name, witness.name))
        sizes = reached(
            [user for user in outside if user.name not in self._flow],
            lambda size: [u for u in size.users if u not in inside and u.name not in self._flow],
        )
        users = (user for size in sizes for user in size.users if user not in inside)
        reader = next((user for user in users if user.name in self._flow), None)
        if reader is None:
            return None
        sentence = f"a size of {node.name} is used by {reader.name}"
        return Refusal(Reason.USED_OUTSIDE, sentence, (node.name, reader.name))

    def _reaches(self, node: fx.Node, entry: fx.Node) -> bool:
        """Whether an in-place operator changes the entry's memory, and something reads the entry after it."""
        same = base_of(self._gm, node)[0] is base_of(self._gm, entry)[0]
        return same and any(self._position[user] > self._position[node] for user in entry.users)
