"""Dominators and post-dominators of a graph's tensor flow, with constant-time queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

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
    """A dominator tree numbered depth first, so that ancestry is a comparison of intervals.

    Args:
        parent: Immediate dominators.
        root: The node that dominates all others.
        order: All nodes, dominators before those they dominate; those without a dominator are passed over.
    """

    def __init__(self, parent: Mapping[str, str], root: str, order: Iterable[str]) -> None:
        reached = [node for node in order if node in parent and node != root]
        size = dict.fromkeys((root, *reached), 1)
        for node in reversed(reached):
            size[parent[node]] += size[node]
        self._first, self._last = {root: 0}, {root: size[root]}
        free = {root: 1}  # the number that the next child gets
        for node in reached:
            above = parent[node]
            number = self._first[node] = free[above]
            self._last[node] = free[above] = number + size[node]
            free[node] = number + 1

    def __contains__(self, node: str) -> bool:
        return node in self._first

    def is_ancestor(self, a: str, b: str) -> bool:
        """Whether `a` lies on the path from the root to `b`, `a == b` included."""
        return a in self and b in self and self._first[a] <= self._first[b] < self._last[a]


class Dominance:
    """Who dominates whom among the nodes of `flow_nodes`.

    A chain, whose nodes but the first have one source and whose nodes but the last have one user, is searched as one
    node: inside it the answer is the order, and the search takes most of the time.

    Args:
        flow: The nodes, in graph order.

    Attributes:
        sources: Names of the nodes of the flow that each node reads.
    """

    def __init__(self, flow: dict[str, fx.Node]) -> None:
        self.sources: Mapping[str, list[str]] = {
            name: [source.name for source in node.all_input_nodes if source.name in flow]
            for name, node in flow.items()
        }
        self._position = {name: i for i, name in enumerate(flow)}
        users = Counter(chain.from_iterable(self.sources.values()))
        self._head: dict[str, str] = {}  # the first node of each node's chain
        self._tail: dict[str, str] = {_SOURCE: _SOURCE}  # the last node of the chain that begins with a node
        for name, sources in self.sources.items():
            follows = len(sources) == 1 and users[sources[0]] == 1
            head = self._head[name] = self._head[sources[0]] if follows else name
            self._tail[head] = name
        heads = [name for name in flow if self._head[name] == name]
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from((_SOURCE, *heads, _SINK))
        graph.add_edges_from((self._head[source], name) for name in heads for source in self.sources[name])
        graph.add_edges_from((_SOURCE, name) for name in heads if flow[name].op == "placeholder")
        graph.add_edges_from((self._head[n], _SINK) for n, node in flow.items() if node.op == "output")
        self._immediate: dict[str, str] = nx.immediate_dominators(graph, _SOURCE)
        self._before = _Tree(self._immediate, _SOURCE, heads)
        after = nx.immediate_dominators(graph.reverse(copy=False), _SINK)
        self._after = _Tree(after, _SINK, reversed(heads))

    def immediate(self, node: str) -> str | None:
        """The closest strict dominator of a node, None when only the network's inputs together are one."""
        if self._head[node] != node:
            return self.sources[node][0]
        parent = self._immediate.get(node)
        return None if parent is None or parent == _SOURCE else self._tail[parent]

    def dominates(self, a: str, b: str) -> bool:
        """Whether every path from the inputs to `b` goes through `a` (`a == b` included)."""
        return self._rules(self._before, a, b, in_order=self._position[a] <= self._position[b])

    def post_dominates(self, a: str, b: str) -> bool:
        """Whether every path from `b` to the outputs goes through `a` (`a == b` included)."""
        return self._rules(self._after, a, b, in_order=self._position[a] >= self._position[b])

    def _rules(self, tree: _Tree, a: str, b: str, *, in_order: bool) -> bool:
        first, second = self._head[a], self._head[b]
        return tree.is_ancestor(first, second) and (first != second or in_order)

    def is_live(self, node: str) -> bool:
        """Whether the node lies between the inputs and the outputs."""
        return self._head[node] in self._before and self._head[node] in self._after
