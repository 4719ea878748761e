"""Measuring over fresh processes: what is asked and read, what their ratios come to, and how a dead one is told."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import fxprune
from fxprune.errors import DeviceError, MeasurementError, OptionError
from fxprune.measuring import asking, fresh
from fxprune.timing import rounds
from fxprune.timing.rounds import Samples, TimingSettings
from tests.tiny import images

QUICK = TimingSettings(warmup=1, min_rounds=3, max_rounds=3, resamples=50, threads=1)
X = torch.randn(2, 3, 8, 8)


def network(depth: int) -> nn.Sequential:
    torch.manual_seed(depth)
    return nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)))


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_students_distribution_is_scipys(level: float, freedom: int) -> None:
    assert rounds._student(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-4)


def test_three_processes_have_students_interval_of_their_logarithms() -> None:
    logs = [-0.3, -0.1, -0.2]
    ratio, interval = rounds.ratio_over_processes([np.full(9, math.exp(x)) for x in logs], TimingSettings())
    assert ratio == pytest.approx(math.exp(-0.2))
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert interval.low == pytest.approx(math.exp(-0.2 - half), rel=1e-4)
    assert interval.high == pytest.approx(math.exp(-0.2 + half), rel=1e-4)


def test_processes_that_agree_by_chance_are_no_surer_than_their_rounds() -> None:
    noisy = np.exp(np.random.default_rng(0).normal(size=31))
    _, interval = rounds.ratio_over_processes([noisy] * 3, TimingSettings())
    alone = rounds.median_interval(noisy)
    assert alone.width / 3 < interval.width < alone.width


def test_the_interval_covers_as_often_as_it_says_though_processes_differ() -> None:
    rng, settings, hits = np.random.default_rng(0), TimingSettings(resamples=50), 0
    for _ in range(300):
        ratios = [np.exp(rng.normal(rng.normal(0.0, 0.05), 0.02, size=15)) for _ in range(3)]
        interval = rounds.ratio_over_processes(ratios, settings)[1]
        hits += interval.low <= 1.0 <= interval.high
    assert 0.91 <= hits / 300 <= 0.99  # resampling three processes reaches 0.75


def test_networks_are_measured_in_as_many_processes_as_asked() -> None:
    found = fxprune.measure(
        network(2), network(1), inputs=X, backend="onnxruntime-cpu", settings=QUICK, processes=2
    )
    assert len(found.by_process) == 2
    assert found.ratio == pytest.approx(math.prod(found.by_process) ** 0.5)
    assert (found.before.backend, found.before.threads) == ("onnxruntime-cpu", 1)
    assert found.before.batch_shape == (2, 3, 8, 8) and found.before.runs >= 2 * 3
    assert found.interval.low <= min(found.by_process) <= max(found.by_process) <= found.interval.high


@pytest.mark.parametrize("backend", ["torch-channels-last", "onnxruntime-cpu"])
def test_every_process_finds_networks_by_their_names(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(
        Path(__file__).parent
    )  # the name is one of this folder, and processes work in their own
    found = fresh.compare(
        "tiny.py:tiny", ["./tiny.py:tiny"], [images(2)], processes=2, backend=backend, settings=QUICK
    )
    assert [one.backend for one in found.processes] == [backend] * 2
    assert all(len(one.seconds) == len(one.conditions) == 2 for one in found.processes)
    torchs = backend == "torch-channels-last"
    name, value = ("memory_format", "channels_last") if torchs else ("provider", "CPUExecutionProvider")
    assert all(told[name] == value for one in found.processes for told in one.conditions)


def test_every_process_has_a_seed_of_its_own_and_samples_are_pooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask(folder: Path, question: Any, module: str, which: str) -> dict[str, Any]:
        asked.append(
            (which, question["settings"]["seed"], question["settings"]["threads"], question["networks"])
        )
        slow = float(len(asked))
        return asdict(Samples("onnxruntime-cpu", "cpu", 1, (2, 5), ((slow,) * 3, (0.5,) * 3)))

    monkeypatch.setattr(asking, "ask", ask)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    ((found,), _) = fresh.compare(
        "a.onnx", ["b.onnx"], [X], processes=3, backend="onnxruntime-cpu", settings=QUICK
    )
    files = [str(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    assert asked == [(f"process {i + 1} of 3", i, 1, files) for i in range(3)]
    assert (found.before.median_s, found.before.runs, found.after.runs) == (2.0, 18, 45)
    assert found.by_process == (0.5, 0.25, 0.5 / 3)


def replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Processes that run a script in place of Python; its third argument is the folder that they share."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "a.onnx").touch()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo one; echo two >&2; kill -9 $$",
            r"process 1 of 2 .* died, ended by SIGKILL: two\. Measure again",
        ),
        ("exit 3", r"process 1 of 2 .* died, with exit code 3; it said nothing"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_a_process_that_dies_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    replaced(monkeypatch, tmp_path, script)
    file = tmp_path / "a.onnx"
    with pytest.raises(MeasurementError, match=words):
        fresh.compare(file, [file], [X], processes=2, backend="onnxruntime-cpu")


@pytest.mark.skipif(sys.platform == "win32", reason="has no shell")
def test_the_error_of_a_process_is_raised_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps({"error": "DeviceError", "message": "no such card"})
    replaced(monkeypatch, tmp_path, f"echo '{answer}' > \"$3\"/answer.json")
    file = tmp_path / "a.onnx"
    with pytest.raises(DeviceError, match="process 1 of 2 that measured failed: no such card"):
        fresh.compare(file, [file], [X], processes=2, backend="onnxruntime-cpu")


def test_a_process_tells_what_went_wrong(tmp_path: Path) -> None:
    fresh.keep_inputs([X], tmp_path)
    question = {"networks": ["none.onnx"], "backend": "onnxruntime-cpu", "device": "cpu", "settings": {}}
    (tmp_path / "question.json").write_text(json.dumps(question))
    asking.answer(tmp_path, fresh._samples)
    told = json.loads((tmp_path / "answer.json").read_text())
    assert told["error"] == "MeasurementError" and "does not exist" in told["message"]


def test_what_cannot_be_asked_of_processes_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"'torch' times modules .* in this process: leave processes out, or name"
    ):
        fxprune.measure(network(1), network(1), inputs=X, processes=2)
    with pytest.raises(OptionError, match="processes is 0"):
        fxprune.measure(network(1), network(1), inputs=X, processes=0)
