"""Dominators and post-dominators of a graph's tensor flow, with constant-time queries."""

from __future__ import annotations

import networkx as nx
from torch import fx

__all__ = ["Dominance", "flow_nodes"]

_SOURCE, _SINK = "<source>", "<sink>"


def flow_nodes(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Nodes that carry tensors computed from the network's inputs, in graph order, the output node included.

    Parameters, what is computed from them alone, and sizes are not part of the flow.
    """
    flow: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output" or (
            node.meta.get("tensor_meta") is not None
            and (node.op == "placeholder" or any(source.name in flow for source in node.all_input_nodes))
        ):
            flow[node.name] = node
    return flow


class _Tree:
    """A dominator tree numbered depth first, so that ancestry is a comparison of intervals."""

    def __init__(self, immediate: dict[str, str], root: str) -> None:
        children: dict[str, list[str]] = {}
        for node, parent in immediate.items():
            if parent is not None and node != root:
                children.setdefault(parent, []).append(node)
        self.parent = immediate
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        stack = [(root, False)]
        while stack:
            node, done = stack.pop()
            if done:
                self._last[node] = len(self._first)
                continue
            self._first[node] = len(self._first)
            stack.append((node, True))
            stack.extend((child, False) for child in children.get(node, ()))

    def __contains__(self, node: str) -> bool:
        return node in self._first

    def is_ancestor(self, a: str, b: str) -> bool:
        """Whether `a` lies on the path from the root to `b`, `a == b` included."""
        return a in self and b in self and self._first[a] <= self._first[b] < self._last[a]


class Dominance:
    """Who dominates whom among the nodes of `flow_nodes`.

    Args:
        flow: The nodes, in graph order.
    """

    def __init__(self, flow: dict[str, fx.Node]) -> None:
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from((_SOURCE, *flow, _SINK))
        graph.add_edges_from((_SOURCE, name) for name, node in flow.items() if node.op == "placeholder")
        graph.add_edges_from((name, _SINK) for name, node in flow.items() if node.op == "output")
        graph.add_edges_from(
            (source.name, name)
            for name, node in flow.items()
            for source in node.all_input_nodes
            if source.name in flow
        )
        self._before = _Tree(dict(nx.immediate_dominators(graph, _SOURCE)), _SOURCE)
        self._after = _Tree(dict(nx.immediate_dominators(graph.reverse(copy=False), _SINK)), _SINK)

    def immediate(self, node: str) -> str | None:
        """The closest strict dominator of a node, None when only the network's inputs together are one."""
        parent = self._before.parent.get(node)
        return None if parent is None or parent == _SOURCE else parent

    def dominates(self, a: str, b: str) -> bool:
        """Whether every path from the inputs to `b` goes through `a` (`a == b` included)."""
        return self._before.is_ancestor(a, b)

    def post_dominates(self, a: str, b: str) -> bool:
        """Whether every path from `b` to the outputs goes through `a` (`a == b` included)."""
        return self._after.is_ancestor(a, b)

    def is_live(self, node: str) -> bool:
        """Whether the node lies between the inputs and the outputs."""
        return node in self._before and node in self._after
