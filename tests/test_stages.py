from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.discovery.planned import regions_named
from fxprune.errors import CalibrationError, DeviceError, GraphError, NoRegionError, OptionError
from fxprune.graph.regions import Discovery
from fxprune.measurements import CountComparison, LatencyComparison
from fxprune.options import FitSettings
from fxprune.pipeline import opening, stages, targets
from fxprune.pipeline.job import StageTimes
from fxprune.scoring.cached import CachedScorer
from fxprune.selection.planner import Planner
from tests.doubles import brief, comparison, count_latency
from tests.tiny import BLOCKS, images, tiny


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_latency(monkeypatch)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The sets that the fast scorer computes, in order."""
    done: list[tuple[str, ...]] = []

    def counting(name: str) -> None:
        real = getattr(CachedScorer, name)

        def method(self: CachedScorer, regions: Sequence[Any], start: Any = ()) -> Any:
            done.append((name, *(r.label for r in regions)))
            return real(self, regions, start)

        monkeypatch.setattr(CachedScorer, name, method)

    counting("fit")
    counting("estimate")
    return done


def compress(k: int | None = None, *, model: nn.Module | None = None, **settings: Any) -> fx.GraphModule:
    settings = {"recipe": brief(), "progress": False, "latency_batch": 2, **settings}
    small = fxprune.compress(model or tiny(), settings.pop("loader", images()), k, **settings)
    assert isinstance(small, fx.GraphModule)
    return small


def ratio(small: nn.Module) -> float:
    latency = fxprune.report(small).latency
    assert isinstance(latency, LatencyComparison)
    return latency.ratio


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of k, target_speedup, target_latency_ms, regions and plan, not none of them"),
        ({"k": 1, "target_speedup": 1.2}, r"not \['k', 'target_speedup'\]"),
        ({"target_latency_ms": 1.0, "target_speedup": 1.2}, r"not \['target_speedup', 'target_latency_ms'\]"),
        ({"target_speedup": 0.9}, "target_speedup is 0.9; it must be above 1"),
        ({"target_speedup": 1.0}, "must be above 1"),
        ({"target_latency_ms": 0.0}, "target_latency_ms is 0.0; it must be positive"),
        ({"k": 1, "regions": ["body.1"]}, r"not \['k', 'regions'\]"),
        ({"regions": []}, r"regions is \[\]; it must be labels of regions, at least one"),
        ({"regions": [1]}, r"regions is \[1\]; it must be labels"),
        ({"k": 0}, "k is 0; it must be a whole number, 1 or more"),
        ({"k": True}, "k is True"),
        ({"k": 5}, "k is 5, but at most 4 regions"),
        ({"k": 1, "min_agreement": 1.5}, "min_agreement is 1.5"),
        ({"k": 1, "threads": 0}, "threads is 0"),
        ({"k": 1, "recipe": "slow"}, "recipe is 'slow'; choose from"),
        ({"k": 1, "cost": "macs"}, "cost is 'macs'; choose from"),
        ({"target_speedup": 1.2, "cost": "flops"}, "cost is 'flops', and a target is one of latency"),
    ],
)
def test_goals_out_of_range_are_refused_before_any_work(settings, message: str, work) -> None:
    with pytest.raises(OptionError, match=message):
        compress(**settings)
    assert work == []


@pytest.mark.parametrize("target", [1.15, 2.5])
def test_a_speedup_is_reached_with_no_more_than_it_takes(target: float) -> None:
    small = compress(target_speedup=target)
    plan = fxprune.report(small).plan
    assert ratio(small) <= 1 / target
    assert plan.recovery_loss is not None
    if len(plan.chosen) > 1:
        # with one region less the path had not reached it
        assert ratio(compress(len(plan.chosen) - 1)) > 1 / target


def test_regions_that_a_later_one_made_needless_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    def smallest_first(planner: Planner) -> Iterator[tuple[Any, ...]]:
        scores = sorted(planner.scores, key=lambda score: score.cost.saving)
        regions = [score.region for score in scores]
        yield from (tuple(regions[: i + 1]) for i in range(len(regions)))

    monkeypatch.setattr(Planner, "path", smallest_first)
    # the four save 10, 19, 28 and 38 %: the third meets the target with the second alone
    plan = fxprune.report(compress(target_speedup=1 / 0.6)).plan
    assert plan.chosen == ("body.1", "body.2")


def test_a_latency_in_milliseconds_is_reached() -> None:
    original = fxprune.report(compress(1)).before.median_s
    goal = 1e3 * original * 0.7
    report = fxprune.report(compress(target_latency_ms=goal))
    assert 1e3 * report.after.median_s <= goal


def test_a_target_beyond_every_network_says_how_far_one_can_go(work) -> None:
    with pytest.raises(
        OptionError, match=r"speed-up of 100.0 is out of reach: without all 4 regions .* times as fast"
    ):
        compress(target_speedup=100.0)
    with pytest.raises(OptionError, match=r"1e-09 ms is out of reach"):
        compress(target_latency_ms=1e-9)
    assert work == []  # known before anything is scored


def test_a_target_that_only_the_last_measurement_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def latencies_without(
        job: Any, sets: Sequence[Any], settings: Any = None
    ) -> tuple[LatencyComparison, ...]:
        asked.append(len(sets))
        # promising at first, disappointing ever after
        return tuple(comparison(1.0, 0.1 if len(asked) == 1 else 0.97) for _ in sets)

    monkeypatch.setattr(targets, "latencies_without", latencies_without)
    with pytest.raises(
        OptionError, match=r"reach: the furthest plan, \d regions, is 1.03 times as fast \(torch\)"
    ):
        compress(target_speedup=1.5)
    assert len(asked) > 1


def test_least_agreement_is_taken_on_images_kept_apart() -> None:
    shown, model = 2 * images(20), tiny(6)
    small = compress(4, model=model, min_agreement=0.0, loader=shown)
    report = fxprune.report(small)
    assert report.images == 16
    assert report.agreement is not None and report.held_back_agreement is not None
    with torch.no_grad():
        agreeing = int((model(shown).argmax(1) == small(shown).argmax(1)).sum())
    assert 0 < agreeing < 20
    # four images were kept apart, and every image counts in one figure alone
    assert 16 * report.agreement + 4 * report.held_back_agreement == agreeing
    assert fxprune.report(compress(1)).held_back_agreement is None


@pytest.mark.parametrize("recipe", ["fast", "practise"])
def test_named_regions_are_cut_without_scoring_or_timing_others(recipe: str, work) -> None:
    small = compress(regions=["body.3", "body.1"], recipe=brief(recipe, adaptor=2, mimic=2))
    report = fxprune.report(small)
    assert report.plan.chosen == ("body.1", "body.3") and report.plan.scores == ()
    assert "recovery" in report.durations and not {"latency", "scoring", "selection"} & set(report.durations)
    assert "cut as asked for: body.1, body.3" in str(report)
    names = {name for name, _ in small.named_modules()}
    assert not any(name.startswith(("body.1", "body.3")) for name in names) and "body.2" in names
    assert work == ([("fit", "body.1", "body.3")] if recipe == "fast" else [])


@pytest.mark.parametrize("cost", ["flops", "parameters"])
def test_what_is_counted_is_not_timed(cost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost_in_noise(*args: Any, **options: Any) -> Any:
        raise AssertionError("timed to choose")

    monkeypatch.setattr("fxprune.pipeline.stages.latencies_without", lost_in_noise)
    report = fxprune.report(compress(2, cost=cost))
    counts = [score.cost for score in report.plan.scores]
    assert all(isinstance(one, CountComparison) and one.unit == cost for one in counts)
    assert cost in report.durations and "latency" not in report.durations
    rows = report.to_dict()["plan"]["scores"]
    assert [row["count"]["after"] for row in rows] == [one.after for one in counts]
    assert {row["latency"] for row in rows} == {None}
    assert f" % of {cost}" in str(report)
    least = min(report.plan.scores, key=lambda score: score.recovery_loss / score.cost.saving)
    assert least.region.label in report.plan.chosen


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ("body.9", r"regions names body.9, and no region is called that; did you mean body\.\d"),
        (["xyz"], r"regions names xyz, .* called that; there are: body\.0, body\.1"),
    ],
)
def test_regions_that_are_not_there_are_named(regions: str | list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compress(regions=regions)


def test_a_region_that_was_refused_says_why() -> None:
    with pytest.raises(OptionError, match=r"regions names body.1, which cannot be cut: .*ignore"):
        compress(regions="body.1", ignore="body.1")


def test_regions_that_overlap_are_refused() -> None:
    one = next(iter(fxprune.discover(fxprune.trace(tiny(), images(2))).regions))
    nested = replace(one, label="outer")
    with pytest.raises(OptionError, match=f"regions names {one.label} and outer, which overlap"):
        regions_named(["outer", one.label], Discovery((one, nested), ()))


def test_an_agreement_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fxprune.recovery.fidelity.agreement", lambda *_: 0.5)
    with pytest.raises(OptionError, match=r"min_agreement is 0.9, but without body.* agrees .* on 0.500 of"):
        compress(1, min_agreement=0.9, out=tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["held_back_agreement"] == 0.5


def test_agreement_needs_class_scores(work) -> None:
    model = nn.Sequential(*list(tiny().children())[:3])
    assert fxprune.report(compress(1, model=model)).agreement is None
    work.clear()
    with pytest.raises(OptionError, match="one score for each class"):
        compress(1, model=model, min_agreement=0.5)
    assert work == []


def test_a_finished_run_is_not_computed_again(tmp_path: Path, work) -> None:
    first = compress(2, out=tmp_path)
    assert sorted(work)[-5:] == sorted(
        [("fit", *fxprune.report(first).plan.chosen), *(("fit", b) for b in BLOCKS)]
    )
    work.clear()
    second = compress(2, out=tmp_path)
    assert work == []
    assert fxprune.report(second).plan == fxprune.report(first).plan
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    # another goal uses the same scores: no region is fitted again by itself
    other = compress(3, out=tmp_path, selection="independent")
    assert work == [("fit", *fxprune.report(other).plan.chosen)]


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work) -> None:
    compress_alone = partial(compress, 2, threads=1)  # one fit at a time, so that two are finished
    whole = fxprune.report(compress_alone()).plan
    work.clear()
    fit = CachedScorer.fit

    def interrupted(self: CachedScorer, regions: Sequence[Any], start: Any = ()) -> Any:
        if len(work) == 2:
            raise KeyboardInterrupt
        return fit(self, regions, start)

    with monkeypatch.context() as patch:
        patch.setattr(CachedScorer, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress_alone(out=tmp_path)
    finished = set(work)
    assert len(finished) == 2
    work.clear()
    assert fxprune.report(compress_alone(out=tmp_path)).plan == whole
    assert finished.isdisjoint(work)


@pytest.mark.parametrize(
    ("change", "says"), [({"seed": 1}, "settings"), ({"loader": images(12, seed=9)}, "images")]
)
def test_a_changed_setting_starts_anew_and_says_why(change, says: str, tmp_path: Path, work, caplog) -> None:
    compress(1, out=tmp_path)
    work.clear()
    with caplog.at_level(logging.WARNING):
        compress(1, out=tmp_path, **change)
    assert {entry for entry in work if len(entry) == 2} >= {("fit", b) for b in BLOCKS}
    assert any("starting anew" in r.getMessage() and says in r.getMessage() for r in caplog.records)


def test_the_report_is_written_and_the_model_kept(tmp_path: Path) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = compress(2, model=model, out=tmp_path)
    report = fxprune.report(small)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == json.loads(report.to_json())
    assert data["plan"]["chosen"] == list(report.plan.chosen) and len(report.plan.chosen) == 2
    assert data["settings"]["k"] == 2 and data["settings"]["selection"] == "greedy"
    assert report.recovery_loss_before > 0
    assert report.fold_error is not None and report.fold_error < 1e-4
    assert report.parameters[1] == sum(p.numel() for p in small.parameters()) < report.parameters[0]
    stages = {"trace", "evaluation", "latency", "scoring", "selection", "recovery", "measurement"}
    assert stages == set(report.durations)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_practise_mimics_from_the_bare_cut_and_still_checks_its_folds() -> None:
    report = fxprune.report(compress(2, recipe=brief("practise", adaptor=2, mimic=2)))
    assert report.settings["selection"] == "independent"
    assert report.plan.recovery_loss is None
    assert report.fold_error is not None and report.fold_error < 1e-4


def test_networks_and_images_that_do_not_fit_are_refused(work) -> None:
    with pytest.raises(
        CalibrationError, match=r"does not accept the calibration images of shape \[\(12, 1, 16, 16\)"
    ):
        compress(1, model=fxprune.trace(tiny(), images(2)), loader=images()[:, :1])
    with pytest.raises(CalibrationError, match=r"torch.float64, the network's weights torch.float32"):
        compress(1, loader=images().double())
    with pytest.raises(GraphError, match=r"float16; recovery needs float32: call model.float\(\) first"):
        compress(1, model=tiny().half())
    with pytest.raises(GraphError, match="meta device"):
        compress(1, model=tiny().to("meta"))
    with pytest.raises(NoRegionError, match="there is no join at all"):
        compress(1, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(GraphError, match="tap 'nowhere'"):
        compress(1, tap="nowhere")
    assert work == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="torch sees no CUDA device"):
        compress(1, device="cuda")


def test_a_report_comes_from_compress_alone() -> None:
    with pytest.raises(GraphError, match="carries no report"):
        fxprune.report(tiny())


def test_a_pickled_network_has_lost_its_report_and_its_inputs_and_says_so(tmp_path: Path) -> None:
    small = fxprune.compress(tiny(), images(), 1, recipe=brief(), progress=False)
    for node in small.graph.nodes:
        node.type = None  # annotations that are text keep old releases of torch from pickling any graph
    small.recompile()
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    with pytest.raises(GraphError, match=r"pickling \(torch\.save of a whole network\) loses it"):
        fxprune.report(again)
    with pytest.raises(
        OptionError, match=r"give example_inputs: .*torch\.save of a whole network drops them"
    ):
        fxprune.export_onnx(again, tmp_path / "small.onnx")


def test_the_clock_adds_up() -> None:
    clock = StageTimes()
    for _ in range(2):
        with clock("a"):
            pass
    first = clock.seconds["a"]
    with clock("a"):
        pass
    assert set(clock.seconds) == {"a"} and clock.seconds["a"] > first > 0


def test_exact_selection_needs_k() -> None:
    with pytest.raises(OptionError, match="needs k"):
        compress(target_speedup=1.2, selection="exact")


def test_mimicking_has_the_memory_of_the_scorer_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    held: list[object] = []
    build, mimic = opening.make_scorer, stages.recover

    def make_scorer(*args: Any, **settings: Any) -> Any:
        made.append(build(*args, **settings))
        return made[-1]

    def recover(*args: Any, **settings: Any) -> Any:
        held.append(made[0]._cache)
        return mimic(*args, **settings)

    monkeypatch.setattr(opening, "make_scorer", make_scorer)
    monkeypatch.setattr(stages, "recover", recover)
    compress(1)
    assert held == [None]
    assert made[0].peak_bytes > 0


def test_the_report_says_when_mimicking_was_undone() -> None:
    useless = replace(brief("practise"), mimic=FitSettings(iterations=2, learning_rate=1e9))
    made = fxprune.report(compress(1, recipe=useless))
    assert made.fidelity_after == made.fidelity_before
    assert any("undone" in note for note in made.notes)
    assert "undone" in str(made)


def test_too_few_savings_are_told_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch, work: list[tuple[str, ...]]
) -> None:
    def noisy(before: object, candidates: Sequence[object], inputs: Any, **rest: Any) -> Any:
        return tuple(comparison(1.0, 0.9, spread=0.2) for _ in candidates)

    monkeypatch.setattr("fxprune.timing.latency.compare", noisy)
    with pytest.raises(
        OptionError, match=r"k is 1, but only 0 regions.*no saving was seen for: body\.0, body\.1"
    ):
        compress(1)
    assert work == []
