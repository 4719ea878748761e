"""What nobody reads: which nodes go, and which may change something else and stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.passes import Canonicalize


def noted(x: Tensor) -> Tensor:
    """Not torch's own: it might count, or write to a file."""
    return x


def kept(add: Callable[[fx.Graph, fx.Node], Any]) -> tuple[bool, bool]:
    """Whether an unread node stays, and whether the pass says that it changed something."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    unread = add(graph, x)
    graph.output(graph.call_function(torch.neg, (x,)))
    root = nn.Module()
    root.relu, root.other, root.weight = nn.ReLU(), nn.Identity(), nn.Parameter(torch.ones(3))
    gm = fx.GraphModule(root, graph)
    modified = Canonicalize()(gm).modified
    assert torch.equal(gm(torch.ones(3)), -torch.ones(3)) or unread.target in (operator.setitem, "add_")
    return unread.name in {node.name for node in gm.graph.nodes}, modified


@pytest.mark.parametrize(
    "add",
    [
        lambda graph, x: graph.call_function(torch.relu, (x,)),
        lambda graph, x: graph.call_function(operator.add, (x, 1)),
        lambda graph, x: graph.call_function(torch.ops.aten.relu.default, (x,)),
        lambda graph, x: graph.call_method("relu", (x,)),
        lambda graph, x: graph.call_module("relu", (x,)),
        lambda graph, x: graph.get_attr("weight"),
    ],
    ids=["function", "operator", "aten", "method", "module", "parameter"],
)
def test_what_computes_a_value_alone_goes(add: Callable[[fx.Graph, fx.Node], Any]) -> None:
    assert kept(add) == (False, True)


@pytest.mark.parametrize(
    "add",
    [
        lambda graph, x: graph.call_function(noted, (x,)),
        lambda graph, x: graph.call_function(operator.setitem, (x, 0, 2.0)),
        lambda graph, x: graph.call_function(torch._assert, (True, "holds")),
        lambda graph, x: graph.call_method("add_", (x, 1)),
    ],
    ids=["foreign", "setitem", "assertion", "in place"],
)
def test_what_may_change_something_else_stays(add: Callable[[fx.Graph, fx.Node], Any]) -> None:
    assert kept(add) == (True, False)


def test_an_identity_alone_is_a_change() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("other", (graph.call_function(torch.neg, (x,)),)))
    root = nn.Module()
    root.other = nn.Identity()
    gm = fx.GraphModule(root, graph)
    assert Canonicalize()(gm).modified
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_function", "output"]
    assert not list(gm.children())
