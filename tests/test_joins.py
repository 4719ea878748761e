"""Joins at the edge of what is a region: scales, types, broadcasts, activations behind identities, runs of branches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.graph.regions import Discovery, Reason, Region

IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Joined(nn.Module):
    """A stem, what a function makes of its output and of two branches and a projection, and a tail."""

    def __init__(self, forward: Callable[[Joined, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.f, self.g = (
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in "fg"
        )
        self.projection, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout()
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self._forward(self, self.stem(x)))


def found(forward: Callable[[Joined, Tensor], Tensor], *kinds: str) -> Discovery:
    gm = fxprune.trace(Joined(forward).eval(), IMAGES, front_end="fx")
    return fxprune.discover(gm, kinds=kinds or ("identity", "projection"))


def the_region(discovery: Discovery) -> Region:
    (region,) = discovery.regions
    return region


def reasons(discovery: Discovery) -> list[Reason]:
    return [rejection.reason for rejection in discovery.rejections]


@pytest.mark.parametrize("alpha", [2.0, 0.5, -1.0])
def test_a_scaled_shortcut_is_no_identity(alpha: float) -> None:
    discovery = found(lambda net, x: torch.add(net.f(x), x, alpha=alpha))
    assert not discovery.regions
    assert reasons(discovery) == [Reason.SCALED]


@pytest.mark.parametrize("alpha", [2.0, 0.5])
def test_a_scaled_projection_is_no_shortcut(alpha: float) -> None:
    discovery = found(lambda net, x: torch.add(net.f(x), net.projection(x), alpha=alpha))
    assert not discovery.regions
    assert reasons(discovery) == [Reason.NO_IDENTITY_PATH]
    plain = the_region(found(lambda net, x: torch.add(net.f(x), net.projection(x))))
    assert plain.kind.value == "projection"


def test_a_shortcut_that_is_subtracted_twice_is_added() -> None:
    assert reasons(found(lambda net, x: torch.sub(net.f(x), x))) == [Reason.SCALED]
    assert reasons(found(lambda net, x: torch.sub(net.f(x), x, alpha=-2))) == [Reason.SCALED]
    assert the_region(found(lambda net, x: torch.sub(net.f(x), x, alpha=-1))).kind.value == "identity"


def test_whole_numbers_beside_floating_point_are_refused_for_their_type() -> None:
    discovery = found(lambda net, x: net.f(x) + x.to(torch.int64))
    assert reasons(discovery) == [Reason.DTYPE]


def test_an_entry_that_was_broadcast_on_the_way_is_no_identity() -> None:
    def forward(net: Joined, x: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(x, 1)
        large = F.interpolate(net.projection(small), size=(8, 8))
        return (large + small) + net.f(large)

    discovery = found(forward)
    assert not discovery.regions
    assert sorted(reasons(discovery), key=str) == [Reason.BROADCAST, Reason.NO_IDENTITY_PATH]


def test_an_activation_behind_an_idle_dropout_belongs_to_the_region() -> None:
    region = the_region(found(lambda net, x: (lambda y: F.relu(net.drop(y + net.f(y))))(F.relu(x))))
    assert region.exit.startswith("relu")
    plain = the_region(found(lambda net, x: F.relu(net.drop(x + net.f(x)))))
    assert plain.exit.startswith("add")


def test_a_chain_ends_with_the_activation_behind_its_operator() -> None:
    discovery = found(lambda net, x: F.relu(net.projection(x)), "sequential")
    assert "relu" in {region.exit for region in discovery.regions}
    assert "projection" not in {region.exit for region in discovery.regions}


class Layer(nn.Module):
    """Four branches with something after the second; `between` behind the first and the third."""

    def __init__(self, middle: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.middle, self.between = middle, between

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branches[0](x)
        x = self.between(x)
        x = x + self.branches[1](x)
        x = self.middle(x)
        x = x + self.branches[2](x)
        x = self.between(x)
        return x + self.branches[3](x)


class Named(nn.Module):
    """A layer under a name, for the names of nodes come from it."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name, self.stem, self.tail = name, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.get_submodule(self.name)(self.stem(x)))


@pytest.mark.parametrize("name", ["aa", "zz"])  # before and behind "add" in the alphabet
@pytest.mark.parametrize(
    ("middle", "between", "lengths"),
    [
        (nn.Identity(), nn.Identity(), [4]),
        (nn.Conv2d(4, 4, 1), nn.Identity(), [2, 2]),
        (nn.Identity(), nn.Conv2d(4, 4, 1), [2]),
        (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), []),
    ],
    ids=["one run", "two runs", "the middle two", "none"],
)
def test_branches_that_follow_each_other_form_one_region_for_each_run(
    middle: nn.Module, between: nn.Module, lengths: list[int], name: str
) -> None:
    gm = fxprune.trace(Named(name, Layer(middle, between)).eval(), IMAGES, front_end="fx")
    regions = fxprune.discover(gm).regions
    assert len(regions) == 4 + len(lengths)
    branches = [[m for m in region.modules if ".branches." in m] for region in regions]
    assert sorted(len(inside) for inside in branches) == [1] * 4 + sorted(lengths)
