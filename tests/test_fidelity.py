"""What users without labels are told: how near a network is to the original, and whether their images are any good."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.calibration.batches import CalibrationSet
from fxprune.errors import CalibrationError
from fxprune.graph.call import Inputs
from fxprune.judging.answers import Answers, alike, answers, class_scores, entropy
from fxprune.recovery.fidelity import Fidelities, Fidelity, overfitted
from fxprune.reports.compression import CompressionReport
from tests.doubles import brief, count_latency
from tests.tiny import images, tiny


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


def compress(loader: Any, k: int = 2, *, model: nn.Module | None = None, **settings: Any) -> fx.GraphModule:
    settings = {"recipe": brief(), "progress": False, "latency_batch": 2, **settings}
    small = fxprune.compress(model or tiny(6), loader, k, **settings)
    assert isinstance(small, fx.GraphModule)
    return small


def reported(loader: Any, k: int = 2, **settings: Any) -> CompressionReport:
    return fxprune.report(compress(loader, k, **settings))


def features(network: nn.Module, pictures: Tensor) -> Tensor:
    """What `Tiny` pools, by a hook on the pooling itself."""
    seen: list[Tensor] = []
    hook = network.get_submodule("pool").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        network(pictures)
    hook.remove()
    return seen[0]


# --- what is held back ---


@pytest.mark.parametrize(
    ("count", "settings", "fitted", "held_back"),
    [
        (19, {}, 19, None),
        (20, {}, 16, 4),
        (30, {"images": 19}, 19, None),
        (5, {"min_agreement": 0.0}, 4, 1),
        (2, {"min_agreement": 0.0}, 1, 1),
        (1, {}, 1, None),
    ],
)
def test_a_fifth_is_held_back_where_there_are_enough_or_it_is_asked_for(
    count: int, settings: dict[str, Any], fitted: int, held_back: int | None
) -> None:
    for measured in (
        reported(images(count), **settings).fidelity_before,
        reported(images(count), **settings).fidelity_after,
    ):
        assert measured.fitted.images == fitted
        assert (None if measured.held_back is None else measured.held_back.images) == held_back


def test_one_image_cannot_be_fitted_and_held_back() -> None:
    with pytest.raises(CalibrationError, match="One image cannot be split"):
        compress(images(1), min_agreement=0.5)


def test_nothing_is_fitted_to_what_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another network comes out where a fitted image is another one, and the same where a held-back one is."""
    shown = images(20)
    parts: list[CalibrationSet] = []
    real = CalibrationSet.split
    monkeypatch.setattr(
        CalibrationSet, "split", lambda *given: parts.extend(real(*given)) or tuple(parts[-2:])
    )
    first = compress(shown).state_dict()
    held_back, fitted = (part.inputs.args[0] for part in parts[:2])

    def with_another(which: Tensor) -> dict[str, Tensor]:
        place = next(i for i in range(20) if torch.equal(shown[i], which[0]))
        changed = shown.clone()
        changed[place] = images(1, seed=9)[0]
        return compress(changed).state_dict()

    other = with_another(held_back)
    assert all(torch.equal(value, other[name]) for name, value in first.items())
    other = with_another(fitted)
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_the_last_steps_fit_what_is_held_back_and_the_report_says_so() -> None:
    without, report = (reported(images(20), recipe=brief(mimic=8, final=final)) for final in (0, 4))
    assert report.mimicking[1].compared == "on all images" and report.mimicking[1].best
    assert report.fidelity_after.held_back == without.fidelity_after.held_back
    assert report.fidelity_after.fitted != without.fidelity_after.fitted
    assert any("steps were fitted to all 20 images" in note for note in report.notes)
    held_back = [line for line in str(report).splitlines() if line.startswith("held-back images (4):")]
    assert len(held_back) == 2 and all(line.endswith("before all were fitted") for line in held_back)
    assert "before all were fitted" not in str(without)


# --- what is measured ---


def test_errors_and_agreement_are_those_of_the_two_networks() -> None:
    shown, model = 2 * images(20), tiny(6)
    small = compress(shown, 4, model=model)
    report = fxprune.report(small)
    fitted, other = report.fidelity_after.fitted, report.fidelity_after.held_back
    assert other is not None and fitted.agreement is not None and other.agreement is not None
    with torch.no_grad():
        agreeing = int((model(shown).argmax(1) == small(shown).argmax(1)).sum())
    assert 0 < agreeing < 20
    assert 16 * fitted.agreement + 4 * other.agreement == pytest.approx(agreeing)
    error = float((features(model, shown) - features(small, shown)).square().mean())
    assert (16 * fitted.feature_error + 4 * other.feature_error) / 20 == pytest.approx(error, rel=1e-4)


def test_before_is_before_mimicking_and_after_behind_it() -> None:
    still = reported(images(20), recipe=brief(mimic=0))
    assert still.fidelity_after == still.fidelity_before
    moved = reported(images(20), recipe=brief(mimic=8))
    assert moved.fidelity_before == still.fidelity_before
    assert moved.recovery_loss_after < moved.recovery_loss_before


def test_a_network_without_class_scores_has_errors_alone() -> None:
    report = reported(images(20), 1, model=nn.Sequential(*list(tiny().children())[:3]))
    measured = report.fidelity_after
    assert measured.held_back is not None
    assert measured.fitted.agreement is None and measured.held_back.agreement is None
    assert measured.held_back.feature_error > 0


@pytest.mark.parametrize(
    ("output", "scores"),
    [
        (torch.zeros(3, 2), True),
        ({"logits": torch.zeros(3, 2), "more": torch.zeros(1)}, True),
        ((torch.zeros(3, 2, 1), torch.zeros(3, 2)), False),
        (torch.zeros(3, 1), False),
        (torch.zeros(3), False),
        ([], False),
        ("text", False),
    ],
    ids=str,
)
def test_class_scores_are_a_first_tensor_of_two_dimensions(output: Any, scores: bool) -> None:
    assert (class_scores(output) is not None) == scores


def test_answers_come_from_all_batches() -> None:
    model, shown = tiny(), images(70)
    given = answers(model, CalibrationSet(Inputs((shown,))), "cpu")
    assert given is not None and given.classes == 5
    with torch.no_grad():
        assert torch.equal(given.named, model(shown).argmax(1))


# --- when the user is warned ---


def measured(fitted: float | None, images: int, other: float | None, held_back: int) -> Fidelities:
    return Fidelities(Fidelity(images, fitted, 0.1), Fidelity(held_back, other, 0.1))


@pytest.mark.parametrize(
    ("fidelity", "warns"),
    [
        (measured(0.95, 400, 0.80, 100), True),
        (measured(0.95, 400, 0.89, 100), True),  # together 0.938: twice the error is 0.054
        (measured(0.95, 400, 0.90, 100), False),  # together 0.94: twice the error is 0.053
        (measured(0.95, 16, 0.75, 4), False),  # four images say little
        (measured(1.0, 16, 0.0, 4), True),
        (measured(1.0, 1, 0.0, 1), False),
        (measured(0.99, 400_000, 0.975, 100_000), False),  # sure, but small
        (measured(0.99, 400_000, 0.965, 100_000), True),
        (measured(0.80, 400, 0.95, 100), False),
        (measured(None, 400, None, 100), False),
        (Fidelities(Fidelity(400, 0.5, 0.1), None), False),
    ],
    ids=str,
)
def test_well_below_is_by_more_than_chance_and_two_points(fidelity: Fidelities, warns: bool) -> None:
    assert (overfitted(fidelity) is not None) == warns


@pytest.mark.parametrize(("after", "warns"), [(0.0, True), (1.0, False)])
def test_the_report_warns_of_a_network_that_learnt_its_images(
    after: float, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = iter((1.0 - after, after))  # on the held-back images before mimicking, and after it
    monkeypatch.setattr(
        "fxprune.recovery.recover.fidelity",
        lambda *of: Fidelity(of[-1].size, next(given) if of[-1].size == 8 else 1.0, 0.1),
    )
    with caplog.at_level(logging.WARNING):
        report = reported(images(40))
    words = "names the original's class on 100.0 % of the 32 images that it was fitted to, but on only 0.0 % of the 8"
    assert any(words in note for note in report.notes) == warns
    assert (words in caplog.text) == (words in str(report)) == warns


def test_the_report_does_not_warn_without_a_reason() -> None:
    assert not any("held back" in note for note in reported(images(40)).notes)


# --- how the images are spread ---


@pytest.mark.parametrize(
    ("named", "classes", "expected"),
    [
        ([3, 3, 3, 3], 5, 0.0),
        ([0, 1, 2, 3, 4], 5, 1.0),
        ([0, 0, 1, 1], 2, 1.0),
        ([0, 0, 1, 1], 10, 0.5),  # ln 2 over ln 4: fewer images than classes
        ([0, 1], 1000, 1.0),
        ([7, 7], 1000, 0.0),
        ([0, 0, 0, 1], 2, (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(2)),
        ([0], 5, None),
    ],
    ids=str,
)
def test_entropy_is_a_share_of_the_largest(named: list[int], classes: int, expected: float | None) -> None:
    assert entropy(Answers(torch.tensor(named), classes)) == (
        None if expected is None else pytest.approx(expected)
    )
    assert entropy(None) is None


@pytest.mark.parametrize(
    ("counts", "classes", "warns"),
    [
        ([500], 1000, True),
        ([98, 2], 2, False),
        ([99, 1], 2, True),
        ([97, 1, 1, 1], 10, True),
        ([94, 1, 1, 1, 1, 1, 1], 10, False),
        ([2], 10, True),
        ([1, 1], 10, False),
        ([1], 10, False),  # one image is like itself
    ],
    ids=str,
)
def test_images_that_look_alike_to_the_original_are_told(
    counts: list[int], classes: int, warns: bool
) -> None:
    named = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert (alike(Answers(named, classes)) is not None) == warns


def test_the_report_warns_of_images_all_alike(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = reported(images(1).repeat(12, 1, 1, 1))
    words = (
        "of its 5 classes it names 1 on 12 images, one of them on 12 (entropy 0 % of the largest possible)"
    )
    assert report.entropy == 0.0
    assert any(words in note for note in report.notes)
    assert words in caplog.text and words in str(report)


def test_entropy_is_that_of_all_images_the_held_back_ones_too() -> None:
    model, shown = tiny(5), images(20)
    with torch.no_grad():
        shares = torch.bincount(model(shown).argmax(1)) / 20
    by_hand = -sum(float(p) * math.log(p) for p in shares if p > 0) / math.log(5)
    assert 0.1 < by_hand < 1
    report = reported(shown, model=model)
    assert report.fidelity_after.held_back is not None
    assert report.entropy == pytest.approx(by_hand)
    front = fxprune.sweep(model, shown, recipe=brief(), progress=False, latency_batch=2)
    assert front.entropy == report.entropy and front.notes == ()


def test_a_sweep_warns_of_images_all_alike() -> None:
    front = fxprune.sweep(
        tiny(), images(1).repeat(3, 1, 1, 1), recipe=brief(), progress=False, latency_batch=2
    )
    assert len(front.notes) == 1 and "look alike" in str(front)


@pytest.mark.parametrize("count", [1, 2])
def test_so_few_images_are_no_error(count: int) -> None:
    report = reported(images(count))
    assert (report.entropy is None) == (count == 1)
    assert report.images == count and report.held_back_agreement is None
