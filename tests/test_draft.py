"""Graph modules whose code is written when it is wanted."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import fx, nn

from fxprune.graph.draft import Draft
from fxprune.graph.extract import share


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))) * scale


@pytest.fixture
def original() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Net())


def replace_relu(gm: fx.GraphModule) -> None:
    next(node for node in gm.graph.nodes if node.target is torch.relu).target = torch.tanh
    gm.recompile()


def test_code_is_generated_once_for_all_rewritings(
    original: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    python_code = fx.Graph.python_code
    monkeypatch.setattr(fx.Graph, "python_code", lambda *a, **k: (written.append(1), python_code(*a, **k))[1])
    draft = share(original)
    replace_relu(draft)
    draft.recompile()
    assert not written
    x = torch.randn(2, 4)
    expected = original.second(torch.tanh(original.first(x)))
    assert torch.equal(draft(x), expected) and torch.equal(draft(x, 2.0), 2 * expected)
    assert len(written) == 1


def test_every_way_to_read_it_sees_the_latest_graph(original: fx.GraphModule) -> None:
    draft = share(original)
    assert draft.code == original.code and isinstance(draft, Draft)
    assert inspect.signature(draft.forward) == inspect.signature(original.forward)
    replace_relu(draft)
    assert "torch.tanh" in draft.code and "torch.relu" not in draft.code
    for read in (str, lambda gm: inspect.getsource(gm.forward), lambda gm: gm.print_readable(False)):
        draft = share(original)
        assert "torch.relu" in read(draft)
        replace_relu(draft)
        assert "torch.tanh" in read(draft)
    assert "torch.relu" in original.code


def test_shares_what_it_should(original: fx.GraphModule) -> None:
    original.graph.output_node().meta["seen"] = True
    draft = share(original)
    assert draft.first is original.first and draft.training is original.training
    assert [n.name for n in draft.graph.nodes] == [n.name for n in original.graph.nodes]
    assert [n.meta for n in draft.graph.nodes] == [n.meta for n in original.graph.nodes]
    next(iter(draft.graph.nodes)).meta["mine"] = 1
    assert "mine" not in next(iter(original.graph.nodes)).meta
    draft.graph.lint()


def test_copies_and_exports(original: fx.GraphModule) -> None:
    x = torch.randn(2, 4)
    wanted = original(x)
    for make in (copy.deepcopy, copy.copy):
        draft = share(original)
        assert torch.equal(make(draft)(x), wanted)
        assert torch.equal(draft(x), wanted)
    program = torch.export.export(share(original).eval(), (x,))
    assert torch.equal(program.module()(x), wanted)
    wrapped = nn.Sequential(share(original))
    assert torch.equal(torch.export.export(wrapped, (x,), strict=True).module()(x), wanted)
