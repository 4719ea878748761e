"""An encoder that several images share is cut in all its calls or in none; the turns of a loop are cut one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PreconditionError
from fxprune.graph.regions import Region
from fxprune.passes import DropRegions
from fxprune.reports.inspection import describe
from tests.doubles import brief, count_latency


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Siamese(nn.Module):
    """Embeds two images, or a batch of three, by one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        both = torch.cat([self.encoder(left), self.encoder(right)], 1)
        return self.head(both.mean((2, 3)))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class LoopTwice(nn.Module):
    """Both: two images, each through two turns."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.loop(left) * self.loop(right)


LEFT, RIGHT = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)


def siamese() -> Siamese:
    torch.manual_seed(0)
    return Siamese().eval()


def regions(model: nn.Module, *inputs: Tensor, front_end: str = "fx") -> dict[str, Region]:
    found = fxprune.discover(fxprune.trace(model.eval(), inputs, front_end=front_end))
    return {region.label: region for region in found.regions}


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_a_shared_encoder_is_cut_in_all_its_calls(front_end: str) -> None:
    model = siamese()
    gm = fxprune.trace(model, (LEFT[:2], RIGHT[:2]), front_end=front_end)
    found = {region.label: region for region in fxprune.discover(gm).regions}
    assert list(found) == ["encoder.1#all", "encoder.2#all"]
    assert all(len(region.calls) == 2 for region in found.values())
    DropRegions([found["encoder.1#all"]])(gm)
    model.encoder[1] = nn.Identity()
    torch.testing.assert_close(gm(LEFT, RIGHT), model(LEFT, RIGHT), rtol=1e-5, atol=1e-5)


def test_what_a_shared_region_saves_is_counted() -> None:
    gm = fxprune.trace(siamese(), (LEFT[:2], RIGHT[:2]))
    saved = [r["parameters_saved"] for r in describe(gm, fxprune.discover(gm))["regions"]]
    assert saved == [sum(p.numel() for p in Block().parameters())] * 2


def test_turns_of_a_loop_stay_apart_and_are_tied_turn_by_turn() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert list(regions(Loop(), x)) == ["block#1", "block#2"] or list(regions(Loop(), x)) == ["block"]
    found = regions(LoopTwice(), x, x)
    ends = [[(call.entry, call.exit) for call in region.calls] for region in found.values()]
    assert sorted(map(len, ends)) == [2] * len(ends)
    for calls in ends:
        assert not {entry for entry, _ in calls} & {exit_ for _, exit_ in calls}


def test_blocks_with_weights_of_their_own_are_not_tied() -> None:
    class TwoTowers(Siamese):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block(), Block())

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.encoder(left) - self.other(right)

    found = regions(TwoTowers(), LEFT[:2], RIGHT[:2])
    assert list(found) == ["encoder.1", "encoder.2", "other.1", "other.2"]
    assert not any(region.twins for region in found.values())


def test_regions_overlap_where_their_twins_do() -> None:
    found = regions(siamese(), LEFT[:2], RIGHT[:2])
    first, second = found.values()
    assert not first.overlaps(second)
    assert first.overlaps(first.twins[0])
    with pytest.raises(PreconditionError, match="overlap"):
        DropRegions([first, first.twins[0]])


@pytest.mark.parametrize(
    "settings", [{"k": 1}, {"regions": ["encoder.2#all"]}, {"k": 1, "selection": "independent"}]
)
def test_compress_cuts_both_calls_and_trains_what_both_share(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    count_latency(monkeypatch)
    model = siamese()
    small = fxprune.compress(model, [(LEFT, RIGHT)], recipe=brief(mimic=8), progress=False, **settings)
    (label,) = fxprune.report(small).plan.chosen
    assert label.endswith("#all")
    convolutions = [str(n.target) for n in small.graph.nodes if str(n.target).endswith(".conv")]
    assert len(convolutions) == 2 and len(set(convolutions)) == 1
    assert fxprune.report(small).mimicking
    names = set(small.state_dict())
    assert {name.split(".")[1] for name in names if name.startswith("encoder")} == {
        "0",
        convolutions[0].split(".")[1],
    }
