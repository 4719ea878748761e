"""Dominators against their definition: what no longer reaches, or is reached, once a node is taken away."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from fxprune.discovery.dominance import Dominance, flow_nodes
from tests.laws import law

Sources = list[list[int]]


@st.composite
def flows(draw: st.DrawFn) -> Sources:
    """The sources of every node; the first one or two are inputs, most nodes follow the one before them."""
    inputs = draw(st.integers(1, 2))
    sources: Sources = [[] for _ in range(inputs)]
    for i in range(inputs, draw(st.integers(inputs + 1, 14))):
        sources.append(draw(st.just([i - 1]) | st.lists(st.integers(0, i - 1), min_size=1, max_size=3)))
    return sources


def graph_of(sources: Sources) -> fx.GraphModule:
    """A graph that sums each node's sources, and returns the last node."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for i, read in enumerate(sources):
        if read:
            nodes.append(graph.call_function(sum, ([nodes[s] for s in read],), name=f"n{i}"))
        else:
            nodes.append(graph.placeholder(f"n{i}"))
        nodes[-1].meta["tensor_meta"] = "a tensor"
    graph.output(nodes[-1])
    return fx.GraphModule(nn.Module(), graph)


def reached(sources: Sources, without: int | None) -> set[int]:
    """Nodes that an input reaches once a node is taken away."""
    found: set[int] = set()
    for i, read in enumerate(sources):
        if i != without and (not read or found.intersection(read)):
            found.add(i)
    return found


def reaching(sources: Sources, without: int | None) -> set[int]:
    """Nodes that reach the output once a node is taken away."""
    found = {len(sources) - 1} - {without}
    for i in reversed(range(len(sources))):
        if i in found:
            found.update(s for s in sources[i] if s != without)
    return found


@law(100)
@given(flows())
def test_dominators_are_what_every_path_goes_through(sources: Sources) -> None:
    dominance = Dominance(flow_nodes(graph_of(sources)))
    ends = reaching(sources, None)
    for a in range(len(sources)):
        assert dominance.is_live(f"n{a}") == (a in ends)
        before, after = reached(sources, a), reaching(sources, a)
        for b in range(len(sources)):
            assert dominance.dominates(f"n{a}", f"n{b}") == (a == b or b not in before)
            wanted = b in ends and (a == b or b not in after)
            assert dominance.post_dominates(f"n{a}", f"n{b}") == wanted


@law(100)
@given(flows())
def test_the_immediate_dominator_is_the_closest(sources: Sources) -> None:
    dominance = Dominance(flow_nodes(graph_of(sources)))
    for b in range(len(sources)):
        strict = [a for a in range(len(sources)) if a != b and dominance.dominates(f"n{a}", f"n{b}")]
        assert dominance.immediate(f"n{b}") == (f"n{max(strict)}" if strict else None)


def test_a_node_without_a_way_to_the_output_is_not_live() -> None:
    class TwoWays(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x)
            torch.sigmoid(y)
            return y

    gm = fx.symbolic_trace(TwoWays())
    for node in gm.graph.nodes:
        node.meta["tensor_meta"] = "a tensor"
    dominance = Dominance(flow_nodes(gm))
    assert [name for name in ("x", "relu", "sigmoid") if dominance.is_live(name)] == ["x", "relu"]
