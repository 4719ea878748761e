"""The settings of a fit, and recovery's mimicking: what is trained, at which rate, and what happens when it fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import optimizers
from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.drawing import draw
from fxprune.discovery.taps import find_tap
from fxprune.errors import CalibrationError, OptionError
from fxprune.graph.call import Inputs
from fxprune.options import RECIPES, FitSettings, FrontEnd
from fxprune.recovery import mimicking
from fxprune.recovery import recover as recovery
from fxprune.recovery.comparison import Comparison, compare_whole
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.recovery.original import Original
from fxprune.recovery.recover import Recovered
from fxprune.recovery.training import adaptable_norms, fit_features, optimise, trainable_parameters
from tests.segmenter import Segmenter
from tests.tiny import images, tiny


class Normalised(nn.Module):
    """One residual block with batch norm: images `[N, 3, 8, 8]` to scores `[N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.tail = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
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


def test_where_each_place_has_an_answer_fewer_images_do() -> None:
    settings = FitSettings(batch_size=8, max_pixels=2**20, dense_pixels=2**17)
    assert [settings.images_per_step(side**2, dense=True) for side in (32, 128, 256, 1024)] == [8, 8, 2, 1]
    assert settings.images_per_step(256**2) == 8


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
        ("dense_pixels", 0),
        ("looks", 0),
        ("rates", (0.1, 0.0)),
        ("learning_rate", -1.0),
        ("momentum", 1.0),
        ("batch_size", 0),
        ("iterations", 2.5),
        ("iterations", -1),
        ("final_iterations", 2.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{field} is {re.escape(str(value))}; it must"):
        FitSettings(**{field: value})


@pytest.mark.parametrize("several", [{"rates": (0.1, 0.2)}, {"batch_norm": "either"}])
def test_only_mimicking_tries_several_settings(several: dict[str, Any]) -> None:
    fit = replace(RECIPES["fast"].adaptor, **several)
    with pytest.raises(OptionError, match="only mimicking tries several rates"):
        replace(RECIPES["fast"], adaptor=fit)


def recovered(
    network: nn.Module,
    pictures: Tensor,
    *,
    front_end: FrontEnd = "fx",
    held_back: CalibrationSet | None = None,
    label: str | None = None,
    cache_bytes: int = 0,
    **settings: Any,
) -> Recovered:
    gm = fxprune.trace(network, pictures[:2], front_end=front_end).requires_grad_(False)
    region = next(one for one in fxprune.discover(gm).regions if label in (None, one.label))
    given = {"iterations": 30, "final_iterations": 0, **settings}
    mimic = replace(RECIPES["fast"].mimic, **{"batch_size": 6, "augment": False, **given})
    original = Original(gm, find_tap(gm), draw([pictures]))
    return recovery.recover(original, [region], {}, mimic, held_back=held_back, cache_bytes=cache_bytes)


@pytest.mark.parametrize(("network", "count"), [(tiny, 6), (Segmenter, 2)])
def test_a_step_of_a_dense_network_holds_fewer_pixels(
    network: Callable[[], nn.Module], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = Comparison.loss

    def loss(self: Comparison, inputs: Inputs) -> Tensor:
        seen.append(inputs.batch_size)
        return plain(self, inputs)

    monkeypatch.setattr(Comparison, "loss", loss)
    pixels = images().shape[-1] ** 2
    recovered(network(), images(), iterations=2, rates=(), dense_pixels=2 * pixels)
    assert seen and set(seen) == {count}


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


def test_of_rates_that_diverge_and_one_that_does_not_the_latter_is_found() -> None:
    result = recovered(tiny(), images(), optimizer="sgd", momentum=0.0, rates=(0.02, 1e6, 20.0))
    (fit,) = result.mimicking
    assert [attempt.learning_rate for attempt in fit.attempts] == [1e6, 20.0, 0.02]
    assert fit.attempts[0].feature_error == float("inf") and fit.attempts[0].iterations == 0
    assert fit.last.iterations == 30
    assert result.loss_after < result.loss_before
    assert not result.notes


def test_what_leads_away_at_the_first_look_is_given_up_there() -> None:
    settings = {"schedule": "constant", "warmup": 0, "iterations": 40, "looks": 8}
    (fit,) = recovered(tiny(), images(), rates=(2.0, 1e-2), **settings).mimicking
    assert [attempt.iterations for attempt in fit.attempts] == [5, 40]
    assert 0 < fit.best <= 40
    away, held = fit.attempts
    assert [step for step, _ in away.looks] == [0, 5]
    assert [step for step, _ in held.looks] == list(range(0, 41, 5))
    assert away.looks[0] == held.looks[0] and away.looks[-1][1] == away.feature_error
    assert fit.best == min(held.looks, key=lambda look: look[1])[0]
    (alone,) = recovered(tiny(), images(), rates=(2.0,), **settings).mimicking
    assert [attempt.iterations for attempt in alone.attempts] == [40]


def test_the_last_fit_takes_in_the_images_held_back_and_says_so() -> None:
    held_back = CalibrationSet(Inputs((images(8, seed=1),)))
    rates = {"rates": (1e-2, 3e-3, 1e-3)}
    without, result = (
        recovered(tiny(), images(), held_back=held_back, final_iterations=count, **rates) for count in (0, 20)
    )
    first, last = result.mimicking
    assert (first,) == without.mimicking and not without.notes
    assert last.compared == "on all images" and 0 < last.best <= 20
    assert last.last.learning_rate < first.last.learning_rate
    assert result.after.held_back == without.after.held_back
    assert result.after.fitted.images == without.after.fitted.images
    assert result.after.fitted.feature_error < without.after.fitted.feature_error
    assert result.notes == (
        f"the last {last.best} steps were fitted to all {8 + len(images())} images: what is said of those held back is "
        "from before",
    )


def test_without_held_back_images_or_a_fit_that_helped_there_is_no_last_fit() -> None:
    assert len(recovered(tiny(), images(), final_iterations=20).mimicking) == 1
    held_back = CalibrationSet(Inputs((images(8, seed=1),)))
    useless = {"optimizer": "sgd", "rates": (1e8,)}
    assert (
        len(recovered(tiny(), images(), held_back=held_back, final_iterations=20, **useless).mimicking) == 1
    )


class Staged(nn.Module):
    """Two stages, of two residual blocks and of one, without batch norm: images `[N, 3, 8, 8]` to scores `[N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.between = nn.Conv2d(6, 6, 2, stride=2)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        x = self.between(x)
        x = x + self.last(x).relu()
        return self.head(x.mean((2, 3)))


def test_near_the_cuts_only_what_lies_before_the_junction_is_trained() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Staged()
    before_the_junction = {"stem", "blocks.1", "between"}
    near, whole = (recovered(network, pictures(), near_cuts=one) for one in (True, False))
    assert near.mimicking[0].compared == "near the cuts" and whole.mimicking[0].compared == "at the tap"
    for result, trained in ((near, before_the_junction), (whole, {*before_the_junction, "last"})):
        before, after = network.state_dict(), result.graph.state_dict()
        changed = {name.rpartition(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert changed == trained
        assert result.loss_after < result.loss_before


def test_what_lies_before_the_first_change_runs_once_where_its_values_can_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Staged()
    widths: list[int] = []
    real = Comparison.loss

    def loss(self: Comparison, inputs: Inputs) -> Tensor:
        widths.append(inputs.tensors()[0].shape[1])
        return real(self, inputs)

    monkeypatch.setattr(Comparison, "loss", loss)
    settings: dict[str, Any] = {"label": "last", "cutmix": False}
    kept, live = (recovered(network, pictures(), cache_bytes=size, **settings) for size in (2**20, 0))
    assert set(widths[:30]) == {6} and set(widths[30:]) == {
        3
    }  # channels before the last stage, and of images
    assert kept.loss_after == pytest.approx(live.loss_after, rel=1e-4)
    for (name, one), other in zip(
        kept.graph.state_dict().items(), live.graph.state_dict().values(), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("rate", [2.0, 1e8])
def test_where_nothing_helps_the_network_is_as_before_mimicking(rate: float) -> None:
    result = recovered(
        tiny(), images(), optimizer="sgd", rates=(), learning_rate=rate, momentum=0.0, iterations=60
    )
    assert result.loss_after == result.loss_before
    (fit,) = result.mimicking
    assert fit.best == 0 and len(fit.attempts) == 1
    assert len(result.notes) == 1 and f"at a learning rate of {rate:g}, did not lower" in result.notes[0]
    assert torch.equal(result.graph.state_dict()["stem.weight"], tiny().stem.weight)


def test_features_that_are_not_finite_to_begin_with_are_an_error() -> None:
    network = tiny()
    network.stem.weight.data[0] = float("inf")
    with pytest.raises(CalibrationError, match="feature error in front of mimicking is nan"):
        recovered(network, images())


def test_the_best_state_is_kept_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    measured = mimicking._Best._measured

    def noting(self: mimicking._Best) -> float:
        seen.append(measured(self))
        return seen[-1]

    monkeypatch.setattr(mimicking._Best, "_measured", noting)
    settings = {"rates": (), "learning_rate": 0.3, "schedule": "constant", "iterations": 5, "looks": 5}
    result = recovered(tiny(), images(), **settings)
    (fit,) = result.mimicking
    assert len(seen) == 6
    assert seen[-1] > min(seen) < seen[0]  # else this test shows nothing
    assert result.loss_after == pytest.approx(min(seen), rel=1e-4)
    assert fit.best == seen.index(min(seen))


def test_held_back_images_judge_and_are_not_fitted() -> None:
    """The fitted images are noise that a classifier of other noise need not answer alike: they mislead."""
    others = CalibrationSet(Inputs((images(40, seed=1),)))
    misled = {
        "iterations": 30,
        "rates": (),
        "learning_rate": 3e-2,
        "looks": 30,
        "cutmix": False,
        "optimizer": "relative-adam",
    }
    dark = images(6) * 0.05
    result, alone = (recovered(tiny(), dark, held_back=judges, **misled) for judges in (others, None))
    assert result.after.held_back and result.before.held_back
    assert result.after.held_back.feature_error < result.before.held_back.feature_error
    assert result.mimicking[0].best < alone.mimicking[0].best
    assert alone.loss_after < result.loss_after


def test_looks_are_spread_over_the_fit_and_see_the_evaluation_mode() -> None:
    gm = fxprune.trace(Normalised().eval(), pictures()[:2]).requires_grad_(False)
    regions = fxprune.discover(gm).regions[:1]
    original = Original(gm, find_tap(gm), draw([pictures()]))
    student, _ = recovery.cut_and_fold(original, regions, {})
    comparison = compare_whole(original, student, surviving_tap(original.tap, regions))
    steps: list[tuple[int, bool]] = []

    def look(step: int) -> None:
        steps.append((step, any(norm.training for norm in adaptable_norms(comparison.student))))

    settings = FitSettings(iterations=10, batch_size=4, batch_norm="train", looks=4)
    fit_features(comparison, trainable_parameters(comparison.student), original, settings, look=look)
    assert steps == [(3, False), (5, False), (8, False), (10, False)]
    assert not any(norm.training for norm in adaptable_norms(comparison.student))
    assert int(student.get_submodule("stem.1").num_batches_tracked) == 10


def pictures(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_batches_normalise_first_and_running_statistics_where_that_fails() -> None:
    first = (
        recovered(Normalised().eval(), pictures(40), rates=(1e-2,), batch_size=40).mimicking[0].attempts[0]
    )
    assert first.batch_norm == "train"
    far = {"optimizer": "sgd", "rates": (1e7, 1e6), "batch_size": 40}
    useless = recovered(Normalised().eval(), pictures(40), **far).mimicking[0]
    tried = [(attempt.batch_norm, attempt.learning_rate) for attempt in useless.attempts]
    assert tried == [("train", 1e7), ("eval", 1e7), ("eval", 1e6)]
    (without,) = recovered(tiny(), images(40), batch_size=40).mimicking
    assert without.attempts[0].batch_norm == "eval"


@pytest.mark.parametrize(("count", "batch_size"), [(31, 64), (40, 31)])
def test_few_images_in_a_step_are_not_normalised_by(count: int, batch_size: int) -> None:
    (fit,) = recovered(Normalised().eval(), pictures(count), rates=(1e-2,), batch_size=batch_size).mimicking
    assert [attempt.batch_norm for attempt in fit.attempts] == ["eval"]


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_both_front_ends_lead_to_the_same_network(batch_norm: Any) -> None:
    torch.manual_seed(0)
    network = Normalised().eval()
    for part in (network.stem, network.block, network.tail):
        part[0].bias = None  # normalised by the batch, its gradient is rounding, which is not the same twice
    states = []
    front_ends: tuple[FrontEnd, ...] = ("fx", "export")
    for front_end in front_ends:
        gm = fxprune.trace(network, pictures()[:2], front_end=front_end).requires_grad_(False)
        regions = fxprune.discover(gm).regions[:1]
        original = Original(gm, find_tap(gm), draw([pictures()]))
        student, _ = recovery.cut_and_fold(original, regions, {})
        comparison = compare_whole(original, student, surviving_tap(original.tap, regions))
        settings = FitSettings(iterations=10, batch_size=6, learning_rate=1e-2, batch_norm=batch_norm)
        fit_features(comparison, trainable_parameters(comparison.student), original, settings)
        states.append(student.state_dict())
    by_fx, by_export = states
    assert by_fx.keys() == by_export.keys()
    before = network.state_dict()
    changed = {name for name, tensor in by_fx.items() if not torch.equal(tensor, before[name])}
    assert ("tail.1.running_mean" in changed) is (batch_norm == "train")
    assert "tail.0.weight" in changed
    for name, tensor in by_fx.items():
        assert torch.allclose(tensor, by_export[name], rtol=1e-3, atol=1e-5), name


class Standing(nn.BatchNorm2d):
    """A batch norm that computes its weight, so that no module can stand for it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, 1.0 * self.weight, self.bias)


def test_batch_norms_that_no_module_holds_are_told() -> None:
    network = Normalised().eval()
    network.stem[1] = Standing(6)
    for batch_norm, told in (("train", True), ("eval", False)):
        notes = recovered(network, pictures(), front_end="export", iterations=2, batch_norm=batch_norm).notes
        assert any("kept their running statistics" in n and n.endswith(": batch_norm") for n in notes) is told


def test_width_adam_moves_the_outputs_of_all_widths_alike_and_narrow_ones_less() -> None:
    settings = FitSettings(optimizer="width-adam", learning_rate=0.1, schedule="constant", weight_decay=0.0)
    weights = [nn.Parameter(torch.zeros(width, width)) for width in (4, 16, 64)]
    optimise(
        weights, (sum((w @ torch.ones(len(w))).sum() for w in weights) for _ in "a"), settings, where="here"
    )
    moved = [float((w.detach() @ torch.ones(len(w))).abs().max()) for w in weights]
    assert moved == pytest.approx([0.1 * 4 / 16, 0.1, 0.1])


def stepped(weight: Tensor, slope: Tensor, steps: int = 1) -> Tensor:
    """How `relative-muon` at a rate of 0.01 changes a weight whose loss has a constant slope."""
    trained = nn.Parameter(weight.clone())
    settings = FitSettings("relative-muon", learning_rate=0.01, schedule="constant", weight_decay=0.0)
    optimise([trained], ((trained * slope).sum() for _ in range(steps)), settings, where="here")
    return trained.detach() - weight


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 4, 3, 3)])
def test_muon_moves_a_matrix_in_all_directions_by_the_rate_times_the_size_of_each_channel(
    shape: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.arange(-2, 2)[torch.arange(shape[0]) % 4].view(-1, *[1] * (len(shape) - 1))
    weight, slope = (torch.randn(shape, generator=generator) for _ in "ab")
    weight = weight / weight.flatten(1).square().mean(1).sqrt().view_as(sizes) * sizes
    steep = slope.flatten(1) @ torch.diag(
        torch.logspace(0, -1, slope[0].numel())
    )  # one direction far above another
    moved = stepped(weight, steep.view(shape) / sizes) / sizes
    assert (moved * steep.view(shape)).sum() < 0
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.01, rel=0.25)
    singular = torch.linalg.svdvals(moved.flatten(1))
    assert singular.max() / singular.min() < 2


def test_large_matrices_take_the_same_steps_by_a_shorter_way(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 50, 3, 3, generator=generator)
    slope = torch.randn(128, 450, generator=generator) @ torch.diag(torch.logspace(0, -2, 450))
    short = stepped(weight, slope.view_as(weight))
    monkeypatch.setattr(optimizers, "LARGE", 10**6)
    plain = stepped(weight, slope.view_as(weight))
    assert not torch.equal(short, plain)
    assert (short - plain).norm() < 1e-3 * plain.norm()


def test_muon_leaves_vectors_and_depthwise_convolutions_to_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((7,), (6, 1, 3, 3), (1, 8)):
        weight, slope = (torch.randn(shape, generator=generator) for _ in "ab")
        trained = nn.Parameter(weight.clone())
        settings = FitSettings("relative-adam", learning_rate=0.01, schedule="constant", weight_decay=0.0)
        optimise([trained], ((trained * slope).sum() for _ in range(3)), settings, where="here")
        assert torch.equal(stepped(weight, slope, steps=3), trained.detach() - weight)


def test_muon_takes_the_rate_of_the_schedule_for_all_weights() -> None:
    weights = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
    settings = FitSettings("relative-muon", iterations=1, learning_rate=1.0, warmup=99, schedule="constant")
    optimise(weights, [sum((w.sum() for w in weights), torch.zeros(()))], settings, where="here")
    assert all(float((w.detach() - 1).abs().max()) < 0.02 for w in weights)
