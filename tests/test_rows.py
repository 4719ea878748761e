"""Which values have a batch dimension: seen by two batches, whatever the sizes of constants happen to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.drawing import draw
from fxprune.calibration.rows import Rows, rows_of
from fxprune.discovery.taps import find_tap
from fxprune.errors import GraphError
from fxprune.passes import Prepare
from fxprune.recovery.original import Original
from fxprune.scoring.cached import CachedScorer
from fxprune.scoring.end_to_end import EndToEndScorer
from tests.doubles import brief


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """Two blocks of which the first is cut; what comes between them, with the image at hand, is the case."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] = lambda x, image: x) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two = Block(), Block()
        self.tail = nn.Conv2d(4, 5, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.two(self.between(self.one(self.stem(x)), x)))


def anchors(x: Tensor, image: Tensor) -> Tensor:
    """As a detector's: two rows, for x and y and of no image, made in the shape, type and place of the input."""
    points = torch.zeros_like(image[0, :2]).flatten(1) + 1.0
    return x * points.sum(0).view(8, 8)


def grid(x: Tensor, image: Tensor) -> Tensor:
    """A grid of positions with twice as many rows as there are images in the example."""
    return x + torch.ones_like(image[0, 0, :4, 0]).cumsum(0).view(4, 1, 1)


class Scaled(Net):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.tail(self.two(self.one(self.stem(x)) * scale))


class Extras(Net):
    """Reads a list of tensors behind the cut."""

    def forward(self, x: Tensor, extras: list[Tensor]) -> Tensor:
        return self.tail(self.two(self.one(self.stem(x)) + torch.stack(extras).sum(0)))


class Stacked(nn.Module):
    """Two images that share an encoder, one behind the other or in turns."""

    def __init__(self, *, turns: bool = False) -> None:
        super().__init__()
        self.net, self.turns = Net(), turns

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        both = torch.stack([left, right], 1).flatten(0, 1) if self.turns else torch.cat([left, right])
        features = self.net(both)
        return features if self.turns else torch.cat(features.chunk(2), 1).mean((2, 3))


def pictures(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def original(model: nn.Module, given: Any, tap: str | None = None) -> Original:
    images = draw([given], input_fn=lambda batch: batch)
    gm = fxprune.trace(model.eval(), images.example(2).given)
    Prepare()(gm)
    gm.requires_grad_(False)
    return Original(gm, find_tap(gm, tap), images)


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "anchors": (lambda: Net(anchors), pictures()),
    "grid": (lambda: Net(grid), pictures()),
    "number": (Scaled, (pictures(), 0.5)),
    "list of tensors": (Extras, (pictures(), [torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)])),
    "stacked": (Stacked, (pictures(), pictures(seed=1))),
    "in turns": (lambda: Stacked(turns=True), (pictures(), pictures(seed=1))),
}


@pytest.mark.parametrize("case", CASES)
def test_cached_losses_are_those_of_the_whole_network(case: str) -> None:
    torch.manual_seed(0)
    build, given = CASES[case]
    one = original(build(), given)
    regions = fxprune.discover(one.graph).regions
    settings = brief(adaptor=0).adaptor
    fast = CachedScorer(one, settings, start_images=0)
    for region in regions:
        slow = EndToEndScorer(one, settings).fit([region])
        assert slow.loss > 0
        assert fast.fit([region]).loss == pytest.approx(slow.loss, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_steps_on_some_images_compare_with_those_images(case: str) -> None:
    """With adaptors at the identity and a block whose last layer is zero, nothing is lost, whichever images come."""
    torch.manual_seed(0)
    build, given = CASES[case]
    model = build()
    for block in (m for m in model.modules() if isinstance(m, Block)):
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    one = original(model, given)
    regions = fxprune.discover(one.graph).regions
    fast = CachedScorer(one, brief().adaptor)
    work, cache = fast._work([regions[0]])
    chosen = torch.tensor([4, 1])
    found = work.part(*(cache.select(name, chosen) for name in work.frontier))
    for value, name in zip(found, one.tap, strict=True):
        torch.testing.assert_close(value, cache.select(name, chosen), rtol=1e-4, atol=1e-5)


def test_constants_have_no_rows_and_two_images_to_a_row_are_told_apart() -> None:
    def rows(case: str) -> tuple[dict[str, Rows], Original]:
        build, given = CASES[case]
        one = original(build(), given)
        return rows_of(one.graph, one.images, "cpu"), one

    seen, one = rows("anchors")
    shapes = {n.name: tuple(n.meta["tensor_meta"].shape) for n in one.graph.graph.nodes if n.op != "output"}
    even = [name for name, shape in shapes.items() if shape and shape[0] % 2 == 0 and name not in seen]
    assert "zeros_like" in even
    assert seen["one_conv1"] == Rows()
    stacked, _ = rows("stacked")
    assert stacked["net_stem"] == Rows(2, apart=True)
    turns, _ = rows("in turns")
    assert turns["net_stem"] == Rows(2)


@pytest.mark.parametrize("rows", [Rows(), Rows(2), Rows(2, apart=True)])
def test_rows_are_put_back_as_they_were(rows: Rows) -> None:
    values = torch.arange(24.0).view(6, 4)
    by_image = rows.by_image(values)
    assert by_image.shape == (6 // rows.each, rows.each, 4)
    assert torch.equal(rows.joined(by_image), values)
    if rows.apart:
        assert by_image[1, :, 0].tolist() == [4.0, 16.0]


def test_a_network_of_one_batch_size_is_refused() -> None:
    one = original(Net(lambda x, image: x.view(2, 4, 8, 8)), pictures(2))
    images = draw(pictures())
    with pytest.raises(GraphError, match=r"runs on 2 images at once but not on 3.*let it take any"):
        rows_of(one.graph, images, "cpu")


@pytest.mark.parametrize("case", ["number", "list of tensors"])
def test_numbers_and_lists_among_the_inputs_go_through_compress(case: str) -> None:
    build, given = CASES[case]
    small = fxprune.compress(
        build().eval(), [given], regions=["one"], input_fn=lambda batch: batch, recipe=brief(), progress=False
    )
    assert small(*given).isfinite().all()
