"""Which front end makes the graph: the one that sees more, and what none of them sees is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import NoRegionError
from fxprune.graph.opaque import OpaquePart, opaque_note, opaque_parts
from fxprune.reports.inspection import describe, tables
from tests.doubles import brief


class Branch(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class Whole(Branch):
    """One that torch.fx cannot look into, as timm registers some."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 1 else x


class Closed(Whole):
    """One that torch.export cannot look into either."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) < 1e9 else x


def network(block: type[nn.Module], *others: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(3, 4, 1), block(), *others, nn.Conv2d(4, 4, 1), *ends).eval()


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def untraceable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.tracing.trace._untraceable", lambda: ((), (Whole, Closed)))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "fxprune"):
        yield caplog


def told_by(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in log.records if record.name == "fxprune.tracing.trace"]


def labels(gm: fx.GraphModule) -> list[str]:
    return [region.label for region in fxprune.discover(gm).regions]


@pytest.mark.usefixtures("untraceable")
def test_the_front_end_that_sees_more_is_taken_and_that_is_told(log: pytest.LogCaptureFixture) -> None:
    net = network(Whole, Branch())
    by_fx, found = (fxprune.trace(net, pictures(), front_end=end) for end in ("fx", "auto"))
    whole = sum(p.numel() for p in net.parameters())
    assert labels(by_fx) == ["2"]
    assert opaque_parts(by_fx) == (OpaquePart("1", "Whole", 148, 148 / whole),)
    assert labels(found) == ["1", "2"]
    assert not opaque_parts(found)
    (told,) = told_by(log)
    assert told.startswith(
        "the graph is that of torch.export, for in that of torch.fx nothing can be cut inside"
    )
    assert f"1 opaque module with {100 * 148 / whole:.1f} % of the parameters: 1 (Whole, " in told
    small = fxprune.compress(net, pictures(), regions=["1"], recipe=brief())
    assert told in fxprune.report(small).notes


def test_nothing_else_is_tried_where_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", None)
    assert labels(fxprune.trace(network(Branch), pictures())) == ["1"]


@pytest.mark.usefixtures("untraceable")
def test_what_stays_hidden_is_told_wherever_it_matters(log: pytest.LogCaptureFixture) -> None:
    net = network(Closed)
    gm = fxprune.trace(net, pictures())
    (part,) = opaque_parts(gm)
    assert part.path == "1"
    (told,) = told_by(log)
    assert told.startswith("torch.export was tried too, and failed: Could not guard on data-dependent")
    with pytest.raises(
        NoRegionError, match=r"no join at all\nnothing can be cut inside 1 opaque module .*1 \(Closed"
    ):
        fxprune.compress(net, pictures(), k=1)
    data = {"model": "m", **describe(gm, fxprune.discover(gm))}
    assert json.loads(json.dumps(data))["opaque"] == [
        {"path": "1", "kind": "Closed", "parameters": 148, "share": part.share}
    ]
    rows = [line.split() for line in tables(data).splitlines()]
    assert ["1", "Closed", "148", f"{100 * part.share:.1f}", "%"] in rows
    small = fxprune.compress(network(Closed, Branch()), pictures(), regions=["2"], recipe=brief())
    assert any("1 (Closed, " in note for note in fxprune.report(small).notes)


class Add(nn.Module):
    """An operator as a module, as converters from other formats write them."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other


class Converted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.tail = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.tail(self.add(x, self.conv(x)))


class AsConverted(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@torch.no_grad()
def test_graph_modules_of_foreign_modules_are_looked_into() -> None:
    torch.manual_seed(0)
    net = Converted().eval()
    given = fx.GraphModule(net, AsConverted().trace(net))
    as_it_is = fxprune.trace(given, pictures(), front_end="fx")
    assert [part.kind for part in opaque_parts(as_it_is)] == ["Add"]
    assert labels(as_it_is) == []
    assert labels(fxprune.trace(given, pictures())) == ["conv"]
    small = fxprune.compress(given, pictures(), regions=["conv"], recipe=brief())
    assert "in that of the module itself nothing can be cut" in fxprune.report(small).notes[0]


def test_modules_that_hide_nothing_to_cut_are_not_opaque() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), Scaled()
            self.lstm, self.layer = nn.LSTM(4, 4), nn.TransformerEncoderLayer(4, 1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.lstm(self.norm(self.conv(x)).flatten(2).mT)[0])

    net = Leaves().eval()
    gm = fx.GraphModule(net, AsConverted().trace(net))
    assert [part.path for part in opaque_parts(gm)] == ["layer"]


class Scaled(nn.Module):
    """Neither weights nor a second value: nothing to cut is inside."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_the_largest_parts_are_named_first_and_the_rest_counted() -> None:
    parts = [OpaquePart(f"block{i}", "Block", i, i / 100) for i in range(7)]
    assert opaque_note(parts) == (
        "nothing can be cut inside 7 opaque modules with 21.0 % of the parameters: block6 (Block, 6.0 %), "
        "block5 (Block, 5.0 %), block4 (Block, 4.0 %), block3 (Block, 3.0 %), block2 (Block, 2.0 %) and 2 more"
    )


def test_mobilevit_of_timm_is_seen_whole() -> None:
    timm: Any = pytest.importorskip("timm")
    net = timm.create_model("mobilevit_xxs").eval()
    gm = fxprune.trace(net, torch.randn(2, 3, 64, 64))
    assert not opaque_parts(gm)
    assert len(labels(gm)) > 20
