"""The settings of a fit, and recovery's mimicking: what is trained, at which rate, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.drawing import draw
from fxprune.discovery.taps import find_tap
from fxprune.errors import CalibrationError, OptionError
from fxprune.graph.call import Inputs
from fxprune.options import RECIPES, FitSettings
from fxprune.recovery import recover as recovery
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.recovery.original import Original
from fxprune.recovery.recover import Recovered
from fxprune.recovery.training import optimise
from tests.tiny import images, tiny


class Normalised(nn.Module):
    """One residual block with batch norm: images `[N, 3, 8, 8]` to scores `[N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.tail = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(self.tail(x).mean((2, 3)))


def test_the_papers_rate_falls_tenfold_at_40_and_80_percent() -> None:
    rate = RECIPES["practise"].mimic.rate
    assert [rate(i) for i in (0, 799, 800, 1599, 1600, 1999)] == pytest.approx(
        [0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    )


def test_a_cosine_rate_rises_for_the_warm_up_and_ends_near_zero() -> None:
    settings = FitSettings(iterations=100, learning_rate=1.0, schedule="cosine", warmup=3)
    rates = [settings.rate(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.25)
    assert rates.index(max(rates)) == 3
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("pixels", "count"), [(32 * 32, 64), (128 * 128, 64), (224 * 224, 20), (4096 * 4096, 1), (1, 64)]
)
def test_large_images_come_in_smaller_batches(pixels: int, count: int) -> None:
    assert FitSettings(batch_size=64, max_pixels=2**20).images_per_step(pixels) == count
    assert FitSettings(batch_size=64).images_per_step(pixels) == 64


@pytest.mark.parametrize(
    ("shapes", "pixels"), [([(2, 3, 8, 6)], 48), ([(2, 7, 5)], 1), ([(2, 9), (2, 3, 4, 4)], 16)]
)
def test_pixels_are_counted_where_there_are_images(shapes: list[tuple[int, ...]], pixels: int) -> None:
    assert CalibrationSet(Inputs(tuple(torch.zeros(shape) for shape in shapes))).pixels == pixels


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warmup", -1),
        ("max_pixels", 0),
        ("retries", -1),
        ("unnormalised_rate", 0.0),
        ("learning_rate", -1.0),
        ("momentum", 1.0),
        ("batch_size", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{field} is {value}; it must"):
        FitSettings(**{field: value})


def recovered(
    network: nn.Module, pictures: Tensor, *, front_end: str = "fx", **settings: object
) -> Recovered:
    gm = fxprune.trace(network, pictures[:2], front_end=front_end).requires_grad_(False)  # type: ignore[arg-type]
    region = fxprune.discover(gm).regions[0]
    mimic = replace(RECIPES["fast"].mimic, batch_size=6, augment=False, **{"iterations": 30, **settings})  # type: ignore[arg-type]
    return recovery.recover(Original(gm, find_tap(gm), draw([pictures])), [region], {}, mimic)


def test_mimicking_brings_the_features_nearer_and_leaves_the_classifier() -> None:
    network = tiny()
    result = recovered(network, images())
    assert result.loss_after < 0.9 * result.loss_before
    assert not result.notes
    state = result.graph.state_dict()
    assert torch.equal(state["head.weight"], network.head.weight)
    assert not torch.equal(state["stem.weight"], network.stem.weight)
    gm = fxprune.trace(network, images(2))
    region = fxprune.discover(gm).regions[0]
    readers = (
        FeatureReader(gm, find_tap(gm)),
        FeatureReader(result.graph, surviving_tap(find_tap(gm), [region])),
    )
    again = mean_feature_loss(*readers, draw([images()]), device="cpu")
    assert again == pytest.approx(result.loss_after, rel=1e-5)


def test_a_rate_that_diverges_is_undone_and_a_tenth_of_it_tried() -> None:
    result = recovered(tiny(), images(), optimizer="sgd", unnormalised_rate=20.0, momentum=0.0, retries=3)
    assert result.loss_after < result.loss_before
    assert 1 <= len(result.notes) <= 3
    assert result.notes[0].startswith("mimicking at a learning rate of 20 raised")


def test_when_no_rate_is_left_the_network_is_as_before_mimicking() -> None:
    result = recovered(tiny(), images(), iterations=3, warmup=0, unnormalised_rate=2.0, retries=0)
    assert result.loss_after == result.loss_before
    assert len(result.notes) == 1 and "undone" in result.notes[0]
    assert torch.equal(result.graph.state_dict()["stem.weight"], tiny().stem.weight)


def test_a_loss_that_is_never_finite_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="mimicking loss of mimicking is"):
        recovered(tiny(), images(), optimizer="sgd", iterations=60, unnormalised_rate=1e8, retries=1)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The learning rates that recovery fits with, in order."""
    seen: list[float] = []
    real = recovery.fit_features

    def noting(*arguments: object, **keywords: object) -> None:
        seen.append(arguments[4].learning_rate)  # type: ignore[attr-defined]
        real(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(recovery, "fit_features", noting)
    yield seen


def pictures() -> Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_network_without_batch_norm_has_a_rate_of_its_own(rates: list[float]) -> None:
    recovered(tiny(), images(), iterations=2, retries=0)
    recovered(Normalised().eval(), pictures(), iterations=2, retries=0)
    recovered(Normalised().eval(), pictures(), iterations=2, retries=0, batch_norm="eval")
    mimic = RECIPES["fast"].mimic
    assert [rates[0], *rates[-2:]] == [mimic.unnormalised_rate, mimic.learning_rate, mimic.unnormalised_rate]


def test_batch_norm_that_an_export_fixed_is_told(rates: list[float]) -> None:
    result = recovered(Normalised().eval(), pictures(), front_end="export", iterations=2)
    assert any("stayed in evaluation mode: batch_norm" in note for note in result.notes)
    assert set(rates) <= {RECIPES["fast"].mimic.unnormalised_rate, 3e-4}


def test_width_adam_moves_the_outputs_of_all_widths_alike_and_narrow_ones_less() -> None:
    settings = FitSettings(optimizer="width-adam", learning_rate=0.1, schedule="constant", weight_decay=0.0)
    weights = [nn.Parameter(torch.zeros(width, width)) for width in (4, 16, 64)]
    optimise(
        weights, (sum((w @ torch.ones(len(w))).sum() for w in weights) for _ in "a"), settings, where="here"
    )
    moved = [float((w.detach() @ torch.ones(len(w))).abs().max()) for w in weights]
    assert moved == pytest.approx([0.1 * 4 / 16, 0.1, 0.1])
