from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import NoRegionError, OptionError
from fxprune.reports.sweep import SweepReport
from tests.doubles import brief, comparison, count_latency
from tests.tiny import BLOCKS, images, tiny


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


def sweep(**settings: Any) -> SweepReport:
    return fxprune.sweep(tiny(), images(), recipe=brief(), progress=False, latency_batch=2, **settings)


@pytest.mark.parametrize("selection", ["greedy", "independent"])
def test_the_whole_front_from_one_scoring(selection, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = sweep(selection=selection, out=out)
    assert [len(p.dropped) for p in report.points] == [1, 2, 3, 4]
    for smaller, larger in zip(report.points, report.points[1:], strict=False):
        assert set(smaller.dropped) < set(larger.dropped)
        assert larger.latency.after.median_s < smaller.latency.after.median_s
        assert larger.recovery_loss > 0
    assert set(report.points[-1].dropped) == set(BLOCKS)
    assert {s.region.label for s in report.scores} == set(BLOCKS)
    # what one region costs alone is what it costs as a plan of one
    single = {s.region.label: s.recovery_loss for s in report.scores}
    assert report.points[0].recovery_loss == pytest.approx(single[report.points[0].dropped[0]])
    data = json.loads((out / "sweep.json").read_text())
    assert [p["dropped"] for p in data["points"]] == [list(p.dropped) for p in report.points]
    assert data["settings"]["selection"] == selection
    assert data["accuracy"] is None
    root = ElementTree.parse(out / "sweep.svg").getroot()
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 4
    assert (out / "scores").is_dir()
    assert (
        len(str(report).splitlines()) == 2 + 4 + 2
    )  # the entropy, and a note: one class is named throughout


def test_a_second_sweep_gives_the_same_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep(out=tmp_path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("fxprune.scoring.cached.CachedScorer._work", never)
    second = sweep(out=tmp_path)
    assert second.points == first.points
    assert second.scores == first.scores


def test_evaluate_sees_every_network_and_the_original() -> None:
    seen: list[int] = []

    def evaluate(network: nn.Module) -> float:
        assert isinstance(network, fx.GraphModule)
        assert not any("adaptor" in name for name, _ in network.named_modules())
        assert network(images(2)).shape == (2, 5)
        seen.append(sum(p.numel() for p in network.parameters()))
        return 1.0 / len(seen)

    report = sweep(evaluate=evaluate)
    assert seen[0] == sum(p.numel() for p in tiny().parameters())
    assert seen == sorted(seen, reverse=True)
    assert report.accuracy == 1.0
    assert [p.accuracy for p in report.points] == [0.5, pytest.approx(1 / 3), 0.25, 0.2]
    assert "accuracy of the original 100.00 %" in str(report).splitlines()
    assert "50.00 %" in str(report)


def sweep_all_but(label: str) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fxprune.sweep(model, images(), recipe=brief(), ignore=label, progress=False, latency_batch=2)
    assert set(report.points[-1].dropped) == set(BLOCKS) - {label}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_must_stay_stays_and_the_model_too() -> None:
    sweep_all_but("body.3")


def test_two_regions_in_a_row_and_one_behind_a_block_that_stays() -> None:
    sweep_all_but("body.2")


def test_errors_come_before_any_work() -> None:
    with pytest.raises(OptionError, match="threads is 0"):
        sweep(threads=0)
    with pytest.raises(OptionError, match="selection is 'best'"):
        sweep(selection="best")
    with pytest.raises(NoRegionError, match="no region"):
        fxprune.sweep(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images(), progress=False)


def test_exact_selection_has_no_path() -> None:
    with pytest.raises(OptionError, match="no path"):
        sweep(selection="exact")


def test_a_region_that_no_plan_holds_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def noisy(before: object, candidates: Sequence[nn.Module], inputs: Any, **how: Any) -> tuple[Any, ...]:
        held = [sum(p.numel() for p in one.parameters()) for one in candidates]
        ratios = [0.9 if count > min(held) else 1.0 for count in held]  # the largest block saves nothing
        return tuple(comparison(1.0, ratio) for ratio in ratios)

    monkeypatch.setattr("fxprune.timing.latency.compare", noisy)
    report = sweep(out=tmp_path)
    (useless,) = [score.region.label for score in report.scores if not score.cost.distinguishable]
    assert useless not in report.points[-1].dropped
    assert any(
        f"left out, as no saving was seen beyond the noise: {useless}." in note for note in report.notes
    )
    assert "left out" in str(report) and "left out" in (tmp_path / "sweep.json").read_text()


def test_a_part_of_a_model_can_be_swept() -> None:
    report = sweep(submodule="body")
    assert [len(point.dropped) for point in report.points] == [1, 2, 3, 4]
    assert report.settings["submodule"] == "body"
    with pytest.raises(OptionError, match="has no accuracy of its own"):
        sweep(submodule="body", evaluate=lambda network: 0.0)
