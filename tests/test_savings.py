"""What regions save: equal ones are left out together and share the difference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import MeasurementError
from fxprune.graph.call import Inputs
from fxprune.graph.regions import Region
from fxprune.measurements import LatencyComparison
from fxprune.timing import latency
from fxprune.timing.counting import count_savings, flops
from fxprune.timing.counting import parameters as counted_parameters
from fxprune.timing.savings import measure_savings, without
from tests.doubles import comparison, count_latency
from tests.strategies import BlockSpec, NetSpec, image_batch


def traced() -> fx.GraphModule:
    basic = BlockSpec("basic")
    spec = NetSpec((4, 4), (2,), (False,), ((basic, basic, BlockSpec("bottleneck")), (basic,)))
    return fxprune.trace(spec.build(), image_batch())


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_equal_regions_are_timed_together_and_each_saves_an_equal_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count_latency(monkeypatch)
    gm = traced()
    regions = {region.label: region for region in fxprune.discover(gm).regions}
    timed: list[Sequence[Region]] = []

    def measure(sets: Sequence[Sequence[Region]]) -> Sequence[LatencyComparison]:
        timed.extend(sets)
        return latency.compare(gm, [without(gm, one) for one in sets], [image_batch()])

    found = dict(
        zip(
            regions,
            measure_savings(gm, list(regions.values()), measure),
            strict=True,
        )
    )
    pair = ("stages.0.0", "stages.0.1")
    assert len(timed) == len(regions) - 1
    assert found[pair[0]] == found[pair[1]]
    for label, region in regions.items():
        assert found[label].shared_by == (2 if label in pair else 1)
        block = gm.get_submodule(region.label)
        assert found[label].saving == pytest.approx(parameters(block) / (1 + parameters(gm)))


def test_parameters_and_flops_are_counted_as_by_hand() -> None:
    gm = traced()
    images = image_batch()
    image = Inputs((images[:1],))
    regions = fxprune.discover(gm).regions
    for region, counted in zip(regions, count_savings(gm, regions, "parameters", image), strict=True):
        assert counted.before == parameters(gm)
        assert counted.before - counted.after == parameters(gm.get_submodule(region.label))

    worked: list[int] = []

    def multiply_adds(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        worked.append(2 * out.numel() * module.weight[0].numel())

    for module in gm.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(multiply_adds)
    gm(images[:1])
    by_hand = sum(worked)
    assert flops(gm, image) == by_hand > 0


def test_parameters_that_two_modules_share_count_once_and_those_of_the_graph_too() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * self.scale

    assert counted_parameters(fxprune.trace(Shared(), torch.randn(2, 4))) == 16 + 4


def test_where_nothing_counts_the_cost_cannot_be_counted() -> None:
    gm = fxprune.trace(nn.Sequential(nn.ReLU()), torch.randn(2, 4))
    with pytest.raises(
        MeasurementError, match="cost is 'flops', and the network has none that can be counted"
    ):
        count_savings(gm, (), "flops", Inputs((torch.randn(1, 4),)))


def test_the_noise_is_shared_too() -> None:
    """A block that saves 2 % could not be told from noise of 3 %; four of them, left out at once, can."""
    block = BlockSpec("basic")
    gm = fxprune.trace(NetSpec((4,), (), (), ((block,) * 4,)).build(), image_batch())
    regions = fxprune.discover(gm).regions
    found = measure_savings(gm, regions, lambda sets: [comparison(1.0, 0.92, spread=0.03) for _ in sets])
    assert len(found) == 4
    for one in found:
        assert one.saving == pytest.approx(0.02)
        assert one.distinguishable
        assert one.interval.width == pytest.approx(0.06 / 4)
