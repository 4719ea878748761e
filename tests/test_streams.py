"""What an adaptor's walk goes through, where it stops, and what it takes for the width of the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import GraphError
from fxprune.graph.regions import Side
from fxprune.placement.placement import find_sites

WIDTH = 4


def conv(inner: int = WIDTH, outer: int = WIDTH, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 1, groups=groups)


class Around(nn.Module):
    """One residual block, what leads to it and what follows it."""

    def __init__(
        self,
        before: Callable[[Around, Tensor], Tensor],
        after: Callable[[Around, Tensor], object],
        **parts: nn.Module,
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.block = conv()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> object:
        x = self.before(self, x)
        return self.after(self, x + self.block(x))


def sites(
    before: Callable[[Around, Tensor], Tensor] = lambda net, x: x,
    after: Callable[[Around, Tensor], object] = lambda net, x: x,
    *,
    size: int = 8,
    inputs: int = WIDTH,
    **parts: nn.Module,
) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Operators behind which, and in front of which, an adaptor goes, with its width; and those refused."""
    gm = fxprune.trace(Around(before, after, **parts).eval(), torch.zeros(2, inputs, size, size))
    (region,) = (r for r in fxprune.discover(gm).regions if r.label == "block")
    found = find_sites(gm, [region])
    post, pre = (
        {s.operator: s.channels for s in found.sites if s.side is side} for side in (Side.POST, Side.PRE)
    )
    return post, pre, [refusal.operator for refusal in found.refused]


def test_the_networks_input_has_the_width_of_its_second_dimension() -> None:
    assert sites(after=lambda net, x: net.head(x), head=conv()) == ({}, {"head": WIDTH}, [])


def test_a_stream_of_vectors_has_sites() -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.block(x))

    gm = fxprune.trace(Vectors(), torch.zeros(2, 6))
    found = find_sites(gm, fxprune.discover(gm).regions)
    assert [(s.operator, s.side.value, s.channels) for s in found.sites] == [
        ("stem", "post", 6),
        ("head", "pre", 6),
    ]


def test_paths_that_meet_again_hide_no_reader() -> None:
    def after(net: Around, x: Tensor) -> object:
        first = net.first(x)
        return first, net.second(x.relu() + x.tanh())

    assert sites(after=after, first=conv(), second=conv())[1] == {"first": WIDTH, "second": WIDTH}


def test_a_reader_of_something_else_hides_no_other() -> None:
    def after(net: Around, x: Tensor) -> object:
        first = net.first(x)
        return first, net.columns(x), net.last(x)

    pre = sites(after=after, first=conv(), columns=nn.Linear(8, 3), last=conv())[1]
    assert pre == {"first": WIDTH, "last": WIDTH}


def test_the_walk_stops_where_the_channels_are_gone() -> None:
    def after(net: Around, x: Tensor) -> object:
        return net.head(x.sum(1).reshape(2, 16, WIDTH))

    assert sites(after=after, head=nn.Linear(WIDTH, 5))[1] == {}


def test_an_operator_of_another_width_is_no_site() -> None:
    def gated(net: Around, x: Tensor) -> Tensor:
        value, gate = net.both(x).chunk(2, 1)
        return value * gate.sigmoid()

    assert sites(gated, size=6, both=conv(WIDTH, 2 * WIDTH))[0] == {}

    def doubled(net: Around, x: Tensor) -> Tensor:
        return net.head(torch.cat([x, x], 1))

    # a side of 4 pixels looks like the channels
    assert sites(after=doubled, size=WIDTH, head=conv(2 * WIDTH, 3))[1] == {}


def test_grouped_operators_alone_are_walked_through() -> None:
    grouped = sites(after=lambda net, x: net.head(net.grouped(x)), grouped=conv(groups=WIDTH), head=conv())
    assert grouped[1:] == ({"head": WIDTH}, ["grouped"])
    twice = sites(after=lambda net, x: net.head(net.twice(net.twice(x))), twice=conv(), head=conv())
    assert twice[1:] == ({}, ["twice"])


def test_attention_writes_its_first_result_and_reads_as_a_whole() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x)[0]
            return x + self.fc(x)

    gm = fxprune.trace(nn.Sequential(nn.Linear(6, 8), Block(), Block()).eval(), torch.zeros(2, 5, 6))
    (region,) = (r for r in fxprune.discover(gm).regions if r.modules == ("1.fc",))
    target = {node.name: str(node.target) for node in gm.graph.nodes}
    found = {(target[s.operator], s.side.value) for s in find_sites(gm, [region]).sites}
    assert found == {
        *(("0", "post"), ("1.attention", "post")),
        *(("2.attention", "pre"), ("2.fc", "pre")),
    }


def test_attention_between_two_streams_takes_no_adaptor_in_front() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.other = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(6, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            stream, other = self.stem(x), self.other(x)
            stream = stream + self.block(stream)
            return self.attention(stream, other, other)[0]

    gm = fxprune.trace(Crossed().eval(), torch.zeros(2, 5, 6))
    (region,) = (r for r in fxprune.discover(gm).regions if r.modules == ("block",))
    assert [(s.operator, s.side.value) for s in find_sites(gm, [region]).sites] == [("stem", "post")]


def test_a_narrower_producer_behind_a_repetition_gets_no_adaptor() -> None:
    def widened(net: Around, x: Tensor) -> Tensor:
        return net.stem(x).repeat(1, 2, 1, 1)

    post, _, _ = sites(widened, inputs=3, stem=conv(3, WIDTH // 2))
    assert post == {}


def test_regions_of_another_graph_are_named_by_five_of_their_nodes() -> None:
    gm = fxprune.trace(Around(lambda net, x: x, lambda net, x: x).eval(), torch.zeros(2, WIDTH, 8, 8))
    (region,) = fxprune.discover(gm).regions
    other = replace(region, body=tuple("abcdefg"))
    with pytest.raises(
        GraphError, match=r"regions name \['a', 'b', 'c', 'd', 'e'\], which this graph does not hold"
    ):
        find_sites(gm, [other])
