"""The speed benchmarks parse what they say they do, run on noise alone, and keep what they have."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from benchmarks.claims import (
    accuracy,
    coverage,
    end_to_end,
    graph_scaling,
    onnx_files,
    recovery,
    scorer_choice,
    scoring,
    selection,
    stability,
    user_models,
)
from benchmarks.common import data, environment, jobs, networks, options, result_file
from benchmarks.common.result_file import ResultFile
from benchmarks.judges.published_losses import losses_side_by_side
from benchmarks.judges.zoo import Case
from benchmarks.models.cifar_resnet import resnet
from fxprune.discovery.discovery import discover
from fxprune.errors import OptionError
from fxprune.measurements import Interval, Latency, LatencyComparison
from fxprune.options import RECIPES
from fxprune.pipeline import stages
from fxprune.scoring.end_to_end import EndToEndScorer

TINY = ["--model", "resnet20", "--random", "--images", "4"]
SCRIPTS = [
    accuracy, scoring, scorer_choice, selection, stability, recovery, end_to_end, graph_scaling, onnx_files, user_models
]  # fmt: skip
REGIONS = 4  # ResNet-14 has six blocks, two of which change the shape


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result_file, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = networks.Model(partial(resnet, 14), 16, "resnet20_cifar10")
    monkeypatch.setattr(networks, "MODELS", {**networks.MODELS, "resnet20": tiny})


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Savings that grow with the number of candidates, instead of timing on whatever machine this is."""

    def fake(*arguments: Any, **settings: Any) -> tuple[LatencyComparison, ...]:
        return tuple(comparison(0.9 - 0.01 * i) for i in range(len(arguments[1])))

    monkeypatch.setattr(stages, "measure_savings", fake)
    monkeypatch.setattr("fxprune.timing.latency.compare", fake)


def comparison(ratio: float) -> LatencyComparison:
    one = Latency("torch", "none", (8, 3, 32, 32), 1, 1e-3, 1e-3, 0.0, 10)
    return LatencyComparison(one, one, ratio, Interval(ratio - 1e-3, ratio + 1e-3))


def read(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return loaded


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_options(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert "--threads" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        script.main(["--no-such-option"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--growth", "depth"], "depth"), (["--recipes", "slow"], "slow"), (["--block-models", "vgg"], "vgg")],
)
def test_end_to_end_refuses_unknown_words(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        end_to_end.main(arguments)
    assert f"knows no {complaint}" in capsys.readouterr().err


def test_lists_of_numbers_and_words() -> None:
    assert options.counts("100, 250,500") == (100, 250, 500)
    assert options.words(" a, b,") == ("a", "b")
    assert options.words("") == ()
    with pytest.raises(ValueError, match="invalid literal"):
        options.counts("1,x")


# The second example has ties: mean ranks 1.5 1.5 3 4 against 1 2 3 4, so 4.5 / sqrt(4.5 * 5).
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 9], [10, 20, 30, 31], 1.0),
        ([5, 5, 6, 7], [1, 2, 3, 4], 0.9486833),
        ([1, 2, 3], [3, 2, 1], -1.0),
    ],
)
def test_spearman(first: list[float], second: list[float], expected: float) -> None:
    assert scoring.spearman(first, second) == pytest.approx(expected)


def test_spearman_of_constants_is_undefined() -> None:
    assert scoring.spearman([1.0, 1.0], [1.0, 2.0]) != scoring.spearman([1.0, 1.0], [1.0, 2.0])
    assert scoring.spearman([1.0], [1.0]) != scoring.spearman([1.0], [1.0])


def test_scaling_counts_what_does_not_iterate_once() -> None:
    assert scoring.scaled_seconds(
        fixed=2.0, timed=3.0, timed_iterations=10, iterations=1000
    ) == pytest.approx(102.0)
    assert scoring.scaled_seconds(fixed=2.0, timed=1.9, timed_iterations=10, iterations=1000) == 2.0


def test_exponent_of_known_laws() -> None:
    rows = [{"nodes": n, "cpu_s": {"square": 3e-6 * n**2, "line": 0.5 * n}} for n in (10, 100, 1000)]
    assert graph_scaling.exponent(rows, "square") == pytest.approx(2.0)
    assert graph_scaling.exponent(rows, "line") == pytest.approx(1.0)


@pytest.mark.parametrize(("nodes", "stage_blocks"), [(100, 0), (100, 7), (1003, 50)])
def test_chain_is_a_network_with_every_block_droppable(nodes: int, stage_blocks: int) -> None:
    gm = graph_scaling.chain(nodes, stage_blocks)
    found = discover(gm)
    assert len(found.regions) == nodes // 5
    assert not found.rejections
    assert abs(len(gm.graph.nodes) - nodes) <= 2 + nodes // 5
    assert (
        tuple(gm(torch.randn(2, 2, 8, 8)).shape)
        == next(iter(reversed(gm.graph.nodes))).meta["tensor_meta"].shape
    )


def test_accuracy_runs_and_holds_the_result_to_its_native_twin(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noise(name: str, images: int, seed: int, **settings: Any) -> networks.Subject:
        return networks.subject_of(name, images, seed, random=True)

    tested = data.LabelledImages(torch.randn(6, 3, 16, 16), torch.zeros(6, dtype=torch.long))
    monkeypatch.setattr(networks, "test_images", lambda name, folder: tested)
    monkeypatch.setattr(jobs, "subject_of", noise)
    monkeypatch.setattr(fxprune, "measure", lambda *networks_, **settings: comparison(0.5))
    few = ["--adaptor-iterations", "1", "--mimic-iterations", "1", "--quiet"]
    accuracy.main(["--k", "1", "--images", "4", "--seeds", "2", *few])
    entries = read(results, "accuracy_resnet20_k1_fast")["entries"]
    assert set(entries) == {"4/0", "4/1"}
    for run in entries.values():
        assert len(run["chosen"]) == 1
        assert run["native_max_abs_diff"] < 1e-5
        assert run["latency"]["torch"]["native"]["ratio"] == 0.5
    assert entries["4/0"]["recovery_losses"] != entries["4/1"]["recovery_losses"]
    assert "compared with" in capsys.readouterr().out


def test_graph_scaling_runs(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph_scaling.main(["--nodes", "100,300", "--networks", "", "--repeats", "1"])
    entries = read(results, "graph_scaling")["entries"]
    assert {"chain/100", "chain/300", "exponents"} == set(entries)
    assert set(entries["exponents"]) == {*graph_scaling.STAGES, "total"}
    assert "fitted exponents: discover" in capsys.readouterr().out


def test_scoring_runs_resumes_and_takes_a_reference_over(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*TINY, "--reference-iterations", "1", "--timed-iterations", "1", "--repeats", "1"]
    some = [*few, "--regions", "layer1.0,layer2.1"]
    scoring.main(some)
    first = read(results, "scoring_resnet20_4")
    row = first["entries"]["comparison"][0]
    assert set(row["losses"]) == set(row["reference losses"]) == {"layer1.0", "layer2.1"}
    assert row["times as fast"] > 0
    assert row["sets"] == 2
    assert row["cache MiB"] > 0
    assert "scaled from 1" in capsys.readouterr().out

    marked = first["entries"]["reference/1/layer1.0"] | {"loss": 0.125}
    first["entries"]["reference/1/layer1.0"] = marked
    (results / "other.json").write_text(json.dumps(first))
    scoring.main([*some, "--reference-from", str(results / "other.json"), "--out", "taken"])
    taken = read(results, "taken")["entries"]
    assert taken["comparison"][0]["reference losses"]["layer1.0"] == 0.125
    assert taken["reference taken from/other.json"] == first["environment"]
    scoring.main([*some, "--out", "other"])  # takes the marked entry up
    assert read(results, "other")["entries"]["reference/1/layer1.0"] == marked
    first["settings"]["threads"] = 99  # so all starts anew, but for what is asked for
    (results / "other.json").write_text(json.dumps(first))
    scoring.main([*some, "--reference-from", str(results / "other.json"), "--out", "other"])
    assert read(results, "other")["entries"]["reference/1/layer1.0"] == marked


def test_fits_side_by_side_are_those_of_the_paper() -> None:
    recipe = RECIPES["practise"]
    steep = dataclasses.replace(recipe.adaptor, iterations=6, batch_size=8, learning_rate=2.0)
    recipe = dataclasses.replace(recipe, adaptor=steep)
    subject = networks.subject_of("resnet20", 16, 0, random=True)
    job = jobs.job_of(subject, recipe=recipe, seed=3)
    regions = job.discovery.regions
    together = losses_side_by_side(job, regions, steep)
    alone = {region.label: job.scorer.fit([region]) for region in regions}
    assert isinstance(job.scorer, EndToEndScorer)
    assert together == pytest.approx({label: fit.loss for label, fit in alone.items()}, rel=1e-4)
    moved = [abs(fit.loss - fit.loss_before) / fit.loss_before for fit in alone.values()]
    assert min(moved) > 1e-2  # a hundred times the tolerance


def test_scoring_ablation_rows(results: Path) -> None:
    none = ["--reference-iterations", "0", "--timed-iterations", "0", "--repeats", "1"]
    scoring.main([*TINY, *none, "--regions", "layer1.1", "--ablation"])
    rows = {row["scorer"]: row for row in read(results, "scoring_resnet20_4")["entries"]["comparison"]}
    assert {
        "default",
        "no least squares",
        "no gradient steps",
        "40 iterations",
        "batch 4, 160 iterations",
    } <= set(rows)
    assert rows["no steps at the waist"]["losses"] != rows["default"]["losses"]
    assert rows["no least squares"]["losses"] != rows["default"]["losses"]
    assert rows["no gradient steps"]["losses"] != rows["default"]["losses"]
    assert rows["a cache for each candidate"]["losses"] == rows["default"]["losses"]
    assert rows["default"]["spearman"] is None


def test_scoring_refuses_what_does_not_fit(results: Path) -> None:
    none = [*TINY, "--reference-iterations", "0", "--timed-iterations", "0", "--repeats", "1"]
    with pytest.raises(
        OptionError, match=r"regions names nowhere, and no region is called that; there are: layer1\.0"
    ):
        scoring.main([*none, "--regions", "nowhere"])
    with pytest.raises(OptionError, match="cannot take figures"):
        scoring.main([*none, "--regions", "layer3.1", "--reference-from", str(results / "absent.json")])
    other = {"settings": {"model": "resnet56"}, "entries": {}, "environment": {}}
    (results / "other.json").write_text(json.dumps(other))
    with pytest.raises(OptionError, match="only the device may differ"):
        scoring.main([*none, "--regions", "layer3.1", "--reference-from", str(results / "other.json")])


def test_selection_runs(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selection.main(
        [*TINY, "--k", "2", "--seeds", "1", "--adaptor-iterations", "1", "--mimic-iterations", "1"]
    )
    entries = read(results, "selection_resnet20")["entries"]
    assert [row["selection"] for row in entries["summary"]] == ["independent", "greedy", "exact"]
    assert all(len(entries[f"0/2/{name}"]["chosen"]) == 2 for name in ("independent", "greedy", "exact"))
    assert entries["0/2/exact"]["sets_scored"] == REGIONS * (REGIONS - 1) // 2
    assert entries["0/2/independent"]["sets_scored"] == 0
    exact, greedy = (entries[f"0/2/{name}"] for name in ("exact", "greedy"))
    assert exact["estimate"] / exact["saving"] <= greedy["estimate"] / greedy["saving"] + 1e-9
    assert "greedy" in capsys.readouterr().out


RECOVERED = [
    "--models",
    "resnet20",
    "--random",
    "--images",
    "20",
    "--regions",
    "layer1.0",
    "--iterations",
    "2",
]


def test_variants_recover_the_same_cut(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recovery.main([*RECOVERED, "--seeds", "2", "--variants", "adaptors,fast,practise,at-the-tap"])
    entries = read(results, "recovery")["entries"]
    rows = {row["variant"]: row for row in entries["summary"]}
    assert list(rows) == ["adaptors", "fast", "practise", "at-the-tap"]
    assert all(row["draws"] == 2 and row["ended_worse"] == 0 for row in rows.values())
    one = {variant: entries[f"resnet20/20/1/{variant}"] for variant in rows}
    assert one["adaptors"]["mimicking"] == [] and one["adaptors"]["before"] == one["adaptors"]["after"]
    assert one["fast"]["mimicking"][0]["compared"] == "near the cuts"
    assert one["at-the-tap"]["mimicking"][0]["compared"] == "at the tap"
    assert one["fast"]["before"] == one["adaptors"]["after"]
    bare, fitted = (one[variant]["before"]["fitted"]["feature_error"] for variant in ("practise", "fast"))
    assert fitted < bare
    assert "at-the-tap" in capsys.readouterr().out


def test_the_quick_grid_has_draws_of_its_own(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "QUICK_DRAWS", {"resnet20": 1})
    recovery.main([*RECOVERED, "--quick", "--variants", "adaptors"])
    assert set(read(results, "recovery_quick")["entries"]) == {"resnet20/20/0/adaptors", "summary"}


@pytest.mark.parametrize("wrong", [["--models", "vgg"], ["--variants", "magic"]])
def test_recovery_names_what_it_does_not_know(wrong: list[str], results: Path) -> None:
    with pytest.raises(OptionError, match=f"{wrong[1]}: models are resnet20, .* variants adaptors, fast"):
        recovery.main([*RECOVERED, *wrong])


def test_recovery_names_regions_that_are_not_there(results: Path) -> None:
    with pytest.raises(OptionError, match="regions names nowhere"):
        recovery.main([*RECOVERED, "--regions", "nowhere"])


def scored(file: Path, reference: dict[str, float]) -> None:
    """Leave a result of the scoring benchmark, by which the default scorer prefers layer1.0, then layer1.1."""
    losses = {"layer1.0": 0.1, "layer1.1": 0.2, "layer2.1": 0.3}
    comparison_row = {"scorer": "default", "losses": losses, "reference losses": reference}
    savings = {label: dataclasses.asdict(comparison(0.9)) for label in losses}
    entries = {"comparison": [comparison_row], "savings": savings}
    file.write_text(json.dumps({"settings": {"model": "resnet20"}, "entries": entries}))


def test_choices_that_differ_are_recovered(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(results / "scored.json", {"layer1.0": 0.1, "layer1.1": 0.3, "layer2.1": 0.2})
    few = [*TINY, "--scoring", str(results / "scored.json"), "--seeds", "2", "--iterations", "1"]
    scorer_choice.main(few)
    entries = read(results, "scorer_choice_resnet20")["entries"]
    rows = {(row["k"], row["scorer"]): row for row in entries["summary"]}
    assert list(rows) == [(1, "both"), (2, "default"), (2, "practise"), (3, "both")]
    assert rows[2, "default"]["chosen"] == ["layer1.0", "layer1.1"]
    assert rows[2, "practise"]["chosen"] == ["layer1.0", "layer2.1"]
    runs = [entries[f"{seed}/layer1.0,layer2.1"] for seed in (0, 1)]
    assert rows[2, "practise"]["loss_after"] == pytest.approx(sum(run["loss_after"] for run in runs) / 2)
    assert runs[0]["loss_after"] != runs[1]["loss_after"]  # another draw of images
    assert "practise" in capsys.readouterr().out
    scorer_choice.main([*few, "--k", "1", "--out", "first"])
    assert set(read(results, "first")["entries"]) == {"summary"}  # equal sets need no recovery


def test_choice_needs_a_comparison_of_the_same_network(results: Path) -> None:
    scored(results / "scored.json", {})
    with pytest.raises(OptionError, match="compares no scorers of resnet20"):
        scorer_choice.main([*TINY, "--scoring", str(results / "scored.json")])


def test_stability_counts_equal_choices(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stability.main([*TINY, "--k", "2", "--runs", "2", "--selection", "independent"])
    summary = read(results, "stability_resnet20_k2_torch")["entries"]["summary"]
    assert summary["same"] == 2  # the clock of these tests is steady
    assert len(summary["regions"]) == REGIONS
    assert sum(region["chosen"] for region in summary["regions"].values()) == 4
    assert "2 of 2 runs chose" in capsys.readouterr().out


class Tracker(nn.Module):
    """A network around one that can be traced, with control flow that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.features = resnet(14)

    def forward(self, pictures: list[Tensor]) -> list[Tensor]:
        return [self.features(picture[None]) for picture in pictures if picture.sum() > 0]


def test_user_models_compresses_a_part_of_a_network_that_no_tracer_takes(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    user = user_models.UserModel(
        Tracker,
        lambda: [([*torch.rand(2, 3, 16, 16)], {}) for _ in range(2)],
        "features",
        {"latency_batch": 1},
        lambda model, batch: model(batch[0]),
    )
    monkeypatch.setattr(user_models, "USERS", {"tracker": user})
    user_models.main(["--only", "tracker", "--k", "1"])
    row = read(results, "user_models")["entries"]["tracker"]
    assert row["part"] == "features"
    assert (row["regions"], len(row["chosen"])) == (REGIONS, 1)
    assert row["parameters"][1] < row["parameters"][0]
    assert row["onnx_max_abs_diff"] < 1e-4
    assert row["part_ratio"] < 1
    assert "tracker" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of torch's exporters
def test_onnx_files_are_read_cut_and_written_again(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(resnet, 14), 16
    monkeypatch.setattr(onnx_files, "NETWORKS", {"tiny": build, "other": build})
    monkeypatch.setattr(onnx_files, "_IN_ALL_WAYS", ("tiny",))
    assert onnx_files._work(["other"], None, 0).keys() == {f"other, {onnx_files.WAYS[1]}"}
    onnx_files.main(["--only", "tiny"])
    rows = read(results, "onnx_files")["entries"]
    assert rows.keys() == {f"tiny, {way}" for way in onnx_files.WAYS}
    assert {(row["regions"], row["refused"]) for row in rows.values()} == {(REGIONS, "")}
    assert all(row["cut"] and row["onnx_max_abs_diff"] < 1e-4 for row in rows.values())


def test_files_of_others_are_read_or_refused_in_words(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    fxprune.export_onnx(resnet(14).eval(), folder / "good.onnx", torch.rand(2, 3, 16, 16))
    (folder / "bad.onnx").write_bytes(b"no network")
    onnx_files.main(["--folder", str(folder)])
    rows = read(results, "onnx_files_of_others")["entries"]
    assert (rows["good.onnx"]["regions"], rows["good.onnx"]["refused"]) == (REGIONS, "")
    assert rows["bad.onnx"]["refused"].startswith("it cannot be read as ONNX")


def test_end_to_end_scales_the_papers_recipe(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end_to_end.main([*TINY, "--k", "1", "--recipes", "practise", "--timed-iterations", "1", "--in-process"])
    entries = read(results, "end_to_end_resnet20_k1")["entries"]
    (row,) = entries["table"].values()
    assert row["scaled_from_iterations"] == 1
    none, one = (v for k, v in entries.items() if k.endswith("iterations"))
    gained = one["durations"]["scoring"] - none["durations"]["scoring"]
    assert row["durations"]["scoring"] == pytest.approx(
        none["durations"]["scoring"] + 1000 * max(0.0, gained)
    )
    assert row["durations"]["latency"] == none["durations"]["latency"]
    assert row["peak_bytes"] > 0
    assert "scaled from 1 iterations" in capsys.readouterr().out


def test_end_to_end_grows_in_images_blocks_and_resolution(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[end_to_end.Case] = []
    figures = {"seconds": 1.0, "durations": {}, "regions": 1, "peak_bytes": None}

    def run(case: end_to_end.Case) -> dict[str, Any]:
        seen.append(case)
        return figures

    monkeypatch.setattr(end_to_end, "run", run)
    end_to_end.main([*TINY, "--growth", "images,blocks,resolution", "--growth-only", "--in-process"])
    assert [case.images for case in seen[:3]] == [100, 250, 500]
    assert [case.model for case in seen[3:5]] == ["resnet20", "resnet56"]
    assert [(case.model, case.k, case.size) for case in seen[5:]] == [
        ("mobilenet_v2", 2, size) for size in (96, 160, 224)
    ]
    assert len(read(results, "end_to_end_resnet20_k8")["entries"]["table"]) == 8


def test_scaled_leaves_the_other_stages_alone() -> None:
    none = {"seconds": 10.0, "durations": {"trace": 1.0, "scoring": 2.0, "recovery": 3.0}, "chosen": ["a"]}
    few = {"seconds": 12.0, "durations": {"trace": 1.5, "scoring": 2.5, "recovery": 3.5}, "chosen": ["b"]}
    row = end_to_end.scaled(none, few, 10, RECIPES["practise"])
    assert row["durations"] == {"trace": 1.0, "scoring": 52.0, "recovery": 103.0}
    assert row["seconds"] == 10.0 + 50.0 + 100.0


def test_a_result_starts_anew_under_other_settings(results: Path) -> None:
    book = ResultFile("book", {"k": (1, 2)})
    assert book.once("a", lambda: 1) == 1
    assert ResultFile("book", {"k": (1, 2)}).once("a", lambda: 2) == 1
    assert ResultFile("book", {"k": (1, 3)}).once("a", lambda: 2) == 2


@pytest.mark.parametrize("part", ["versions", "machine"])
def test_a_result_starts_anew_under_other_versions_and_on_another_machine(
    results: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    ResultFile("book", {}).put("a", 1)
    changed = environment.describe() | {part: "another"}
    monkeypatch.setattr(environment, "describe", lambda: changed)
    assert ResultFile("book", {}).entries == {}


def test_every_entry_has_its_own_origin(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment.describe()
    for commit, key in (("1111111", "a"), ("2222222", "b")):
        now = here | {"commit": commit}
        monkeypatch.setattr(environment, "describe", lambda now=now: now)
        ResultFile("book", {}, seed=3, command="python -m x").put(key, 0)
    kept = read(results, "book")
    assert {key: origin["commit"] for key, origin in kept["origins"].items()} == {
        "a": "1111111",
        "b": "2222222",
    }
    assert (kept["seed"], kept["command"]) == (3, "python -m x")


def test_a_commands_note_leaves_out_where_the_data_are() -> None:
    parser = options.parser("recovery", "About.", k=3, data=None)
    for given in (["--data", "elsewhere", "--k", "4"], ["--k", "4", "--data=elsewhere"]):
        assert options.parse(parser, given).command == "python -m benchmarks.claims.recovery --k 4"


def test_a_commands_note_names_files_without_their_folders(tmp_path: Path) -> None:
    parser = options.parser("recovery", "About.", out=None)
    noted = options.parse(parser, ["--out", str(tmp_path / "first")]).command
    assert noted == "python -m benchmarks.claims.recovery --out first"


def test_a_commit_is_marked_for_what_differs_beside_results(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    result, source = tmp_path / "benchmarks" / "results" / "x.json", tmp_path / "source.py"
    assert environment.commit(tmp_path) is None
    result.parent.mkdir(parents=True)
    result.write_text("1")
    source.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "All")
    clean = environment.commit(tmp_path)
    assert clean is not None and not clean.endswith("+")
    result.write_text("2")
    assert environment.commit(tmp_path) == clean
    source.write_text("2")
    assert environment.commit(tmp_path) == f"{clean}+"


def test_the_version_is_noted_whether_or_not_it_is_installed() -> None:
    assert environment.versions()["fxprune"] == fxprune.__version__


def test_coverage_keeps_rows_and_takes_up_those_that_did_not_fail(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def row_of(case: Case, limit: float) -> coverage.Row:
        asked.append(case.name)
        return coverage.Row(case.name, status=coverage.WORKS if case.name == "a" else coverage.FAILED)

    networks_ = [Case(name, lambda: (nn.Identity(), torch.zeros(1))) for name in ("a", "b")]
    monkeypatch.setattr(coverage, "cases", lambda suite: networks_)
    monkeypatch.setattr(coverage, "_row_of", row_of)
    assert coverage.main(["--resume"]) == 1
    assert coverage.main(["--resume"]) == 1
    assert asked == ["a", "b", "b"]
    assert read(results, "coverage")["entries"]["totals"] == {coverage.WORKS: 1, coverage.FAILED: 1}
    assert (results / "coverage.md").read_text().startswith("2 networks: ")


def test_kept_result_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(OptionError, match="no result of these benchmarks"):
        result_file.read_result(tmp_path / "list.json")
