from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from fxprune.graph.regions import Kind, Reason, Region, Rejection
from fxprune.judging.judge import Accuracy
from fxprune.options import RECIPES
from fxprune.pictures.plots import front_svg
from fxprune.records import plain
from fxprune.recovery.fidelity import Fidelities, Fidelity
from fxprune.recovery.mimicking import Attempt, Mimicking
from fxprune.reports.compression import CompressionReport
from fxprune.reports.sweep import SweepPoint, SweepReport
from fxprune.selection.plans import BlockScore, DropPlan
from tests.doubles import comparison


def strict(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are no numbers."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def score(label: str, loss: float, saving: float) -> BlockScore:
    region = Region("x", label, "x", (label,), Kind.IDENTITY, label, (label,), (1, 8, 4, 4), "torch.float32")
    return BlockScore(region, loss, 2 * loss, comparison(0.010, 0.010 * (1 - saving)))


SCORES = (score("layer1.0", 0.5, 0.1), score("layer1.1", 0.25, 0.0), score("layer2.1", math.nan, 0.1))


@pytest.fixture
def report() -> CompressionReport:
    return CompressionReport(
        plan=DropPlan(SCORES, (SCORES[0].region,), 0.5),
        latency=comparison(0.010, 0.008),
        rejections=(Rejection("x", "cat", Reason.CONCATENATION, ("cat",), "joins 2 tensors", "stem"),),
        fidelity_before=Fidelities(Fidelity(50, 0.9, 0.5), Fidelity(12, 0.75, 0.625)),
        fidelity_after=Fidelities(Fidelity(50, 0.96, 0.125), Fidelity(12, 0.875, 0.25)),
        mimicking=(
            Mimicking(
                "near the cuts", (Attempt(0.1, "train", 30, math.inf), Attempt(0.03, "eval", 120, 0.5)), 105
            ),
            Mimicking("at the tap", (Attempt(0.001, "eval", 400, 0.9),), 0),
        ),
        entropy=0.925,
        fold_error=2e-7,
        parameters=(1000, 800),
        accuracy={"before": Accuracy(80, 0.9, 0.975), "after": Accuracy(80, 0.85, 0.95)},
        evaluation={"before": 0.5, "after": 0.25},
        peak_memory_bytes=2**30,
        settings={"recipe": RECIPES["fast"], "kinds": (Kind.IDENTITY,), "worst": math.inf, "tap": ["add"]},
        seed=3,
        durations={"scoring": 1.25, "recovery": 2.5},
        versions={"torch": "2.9"},
        notes=("the classifier stays",),
    )


def test_json_holds_no_number_that_is_none(report: CompressionReport) -> None:
    data = strict(replace(report, settings={"worst": math.inf, "kind": Kind.IDENTITY}).to_json())
    assert data["settings"] == {"worst": None, "kind": "identity"}
    rows = data["plan"]["scores"]
    assert [row["region"]["label"] for row in rows] == ["layer1.0", "layer1.1", "layer2.1"]
    assert rows[0]["score"] == pytest.approx(5.0)
    assert rows[1]["score"] is None  # its saving is lost in the noise: the score is infinite
    assert rows[2]["score"] is None and rows[2]["recovery_loss"] is None
    assert rows[0]["saved_s"] == pytest.approx(0.001)
    assert data["plan"]["chosen"] == ["layer1.0"]
    assert data["latency"]["saved_s"] == pytest.approx(0.002)
    assert data["rejections"][0]["reason"] == "CONCATENATION"
    assert data["fidelity_before"]["held_back"] == {"images": 12, "agreement": 0.75, "feature_error": 0.625}
    assert data["fidelity_after"]["fitted"] == {"images": 50, "agreement": 0.96, "feature_error": 0.125}
    assert (data["images"], data["agreement"], data["held_back_agreement"]) == (50, 0.96, 0.875)
    assert data["accuracy"]["after"] == {"images": 80, "top1": 0.85, "top5": 0.95}
    assert data["evaluation"] == {"before": 0.5, "after": 0.25}
    assert (data["recovery_loss_before"], data["recovery_loss_after"]) == (0.5, 0.125)
    assert data["parameters"] == [1000, 800]


def test_text_says_what_was_cut_saved_and_lost(report: CompressionReport) -> None:
    text = str(report)
    lines = text.splitlines()
    cut = next(line for line in lines if "layer1.0" in line)
    kept = next(line for line in lines if "layer1.1" in line)
    assert cut.split() == ["cut", "layer1.0", "identity", "0.5", "1.000", "10.0", "%", "5"]
    assert kept.split() == ["layer1.1", "identity", "0.25", "0.000", "lost", "in", "noise", "-"]
    assert "latency 10.000 -> 8.000 ms, ratio 0.800 [0.799, 0.801] (torch, counted, batch 8" in text
    assert "parameters 1,000 -> 800 (-20.0 %)" in lines
    assert "fitted images (50): feature error 0.5 after the cut, 0.125 at the end" in lines
    assert "held-back images (12): feature error 0.625 after the cut, 0.25 at the end" in lines
    assert "folding the adaptors changed the features by 2.0e-07 of their largest value" in lines
    same = "same top-1 class as the original on"
    assert f"fitted images (50): {same} 90.0 % after the cut, 96.0 % at the end" in lines
    assert f"held-back images (12): {same} 75.0 % after the cut, 87.5 % at the end" in lines
    assert "mimicked near the cuts at a learning rate of 0.03, best after 105 of 120 steps" in lines
    assert "mimicked at the tap at a learning rate of 0.001, undone: no step was better" in lines
    entropy = "entropy 92 % of the largest possible"
    assert f"calibration images, by the class that the original names: {entropy}" in lines
    assert "top-1 accuracy 90.00 -> 85.00 % on 80 labelled images" in lines
    assert "top-5 accuracy 97.50 -> 95.00 % on 80 labelled images" in lines
    assert "evaluation 0.5 -> 0.25" in lines
    assert "peak memory 1024 MiB" in lines
    assert "refused candidates: 1" in lines
    assert "took scoring 1.2 s, recovery 2.5 s" in lines
    assert lines[-1] == "note: the classifier stays"


def test_what_was_not_measured_is_said_and_not_invented(report: CompressionReport) -> None:
    alone = Fidelities(Fidelity(50, None, 0.5), None)
    bare = replace(
        report,
        accuracy=None,
        evaluation=None,
        entropy=None,
        fold_error=None,
        fidelity_before=alone,
        fidelity_after=alone,
        peak_memory_bytes=None,
    )
    text = str(bare)
    assert bare.agreement is None and bare.held_back_agreement is None
    for absent in ("folding", "top-1", "held-back", "entropy", "accuracy", "evaluation", "peak memory"):
        assert absent not in text


def test_latencies_are_those_of_the_comparison(report: CompressionReport) -> None:
    assert report.before.median_s == pytest.approx(0.010)
    assert report.after.median_s == pytest.approx(0.008)


def test_plain_turns_records_into_json_types() -> None:
    value = {1: (math.nan, -math.inf, 0.5), "reason": Reason.SHAPE, "kind": Kind.IDENTITY, "none": None}
    assert plain(value) == {"1": [None, None, 0.5], "reason": "SHAPE", "kind": "identity", "none": None}


@pytest.fixture
def front() -> SweepReport:
    points = (
        SweepPoint(("a",), 0.25, comparison(0.010, 0.008), 0.9),
        SweepPoint(("a", "b"), math.nan, comparison(0.010, 0.006), None),
    )
    return SweepReport(
        points,
        SCORES,
        0.95,
        40,
        0.5,
        {"backend": "torch"},
        {"scoring": 1.0},
        {"torch": "2.9"},
        ("all alike",),
    )


def test_the_front_as_text_names_what_each_step_adds(front: SweepReport) -> None:
    *table, original, entropy, note = str(front).splitlines()
    assert original == "accuracy of the original 95.00 %, top-1 on 40 labelled images"
    assert entropy.endswith("entropy 50 % of the largest possible") and note == "note: all alike"
    header, _, first, second = (line.split() for line in table)
    assert header[0] == "k"
    assert first == ["1", "a", "8.000", "0.800", "[0.799,", "0.801]", "0.25", "90.00", "%"]
    assert second == ["2", "b", "6.000", "0.600", "[0.599,", "0.601]", "nan", "-"]


def test_the_front_as_json(front: SweepReport) -> None:
    data = strict(front.to_json())
    assert [p["dropped"] for p in data["points"]] == [["a"], ["a", "b"]]
    assert [p["recovery_loss"] for p in data["points"]] == [0.25, None]
    assert (data["accuracy"], data["entropy"], data["notes"]) == (0.95, 0.5, ["all alike"])


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 0.5, "k=1")],
        [(1.0, 0.0, "k=1"), (1.0, 0.0, "k=2")],
        [(3.0, 0.1, "k=1"), (2.0, 0.4, "k=2"), (1.0, 0.9, "<k> & 3")],
        [(3.0, -0.1, "k=1"), (2.0, -0.4, "k=2")],  # an evaluation may be below 0
    ],
)
def test_plots_are_xml_and_stay_inside(points: list[tuple[float, float, str]]) -> None:
    root = ElementTree.fromstring(front_svg(points, x_name="latency, ms", y_name="loss < 1"))
    name = "{http://www.w3.org/2000/svg}"
    dots = root.findall(f"{name}circle")
    assert len(dots) == len(points)
    for dot in dots:
        assert 0 <= float(dot.attrib["cx"]) <= float(root.attrib["width"])
        assert 0 <= float(dot.attrib["cy"]) <= float(root.attrib["height"])
    written = [text.text for text in root.findall(f"{name}text")]
    assert {label for _, _, label in points} | {"latency, ms", "loss < 1"} <= set(written)
