"""Runs of MLPerf's LoadGen: what is kept of them, what is said of them, and how one that fails ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fxprune.errors import MeasurementError, OptionError
from fxprune.measuring import asking, fresh, record
from fxprune.measuring.record import STATUS
from fxprune.shell import cli
from tests.test_json import validate
from tests.tiny import images

FACTORY = f"{Path(__file__).parent / 'tiny.py'}:tiny"
QUICKLY = (
    "--rounds",
    "3",
    "--processes",
    "1",
    "--threads",
    "1",
    "--batch",
    "2",
    "--input-shape",
    "2,3,16,16",
)


def entry(key: str, value: object) -> str:
    return f":::MLLOG {json.dumps({'key': key, 'value': value})}"


def written(folder: Path, **found: object) -> Path:
    """A log of LoadGen, with lines that are none of its events."""
    path = folder / "mlperf_log_detail.txt"
    names = {name.replace("p90", "90.00_percentile"): value for name, value in found.items()}
    path.write_text("\n".join(["heading", *(entry(name, value) for name, value in names.items()), ""]))
    return path


def test_the_gist_of_single_stream(tmp_path: Path) -> None:
    log = written(
        tmp_path,
        effective_min_duration_ms=600_000,
        result_validity="VALID",
        result_query_count=7,
        result_p90_latency_ns=2_000_000,
        early_stopping_latency_ss=3_000_000,
    )
    assert record._gist(log, "SingleStream") == {
        "valid": True,
        "queries": 7,
        "p90_s": 0.002,
        "early_stopping_p90_s": 0.003,
        "short_of_the_rules": [],
    }


def test_a_run_that_the_rules_find_too_short_says_so(tmp_path: Path) -> None:
    log = written(
        tmp_path,
        effective_min_duration_ms=1500,
        result_validity="INVALID",
        effective_samples_per_query=24_575,
        result_samples_per_second=10.5,
    )
    found = record._gist(log, "Offline")
    assert (found["valid"], found["samples_per_s"]) == (False, 10.5)
    assert found["short_of_the_rules"] == ["1.5 of 600 seconds", "24575 of 24576 samples"]


def test_without_loadgen_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fresh, "compare", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr(record.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["measure", FACTORY, FACTORY, *QUICKLY, "--record", str(tmp_path / "r")]) == 2
    assert 'pip install "fxprune[record]"' in capsys.readouterr().err
    with pytest.raises(OptionError, match="LoadGen"):
        record.record(["a"], [], "torch", tmp_path, seconds=1, device=None, threads=1)


@pytest.fixture
def loadgen() -> None:
    pytest.importorskip("mlperf_loadgen")


@pytest.mark.usefixtures("loadgen")
def test_loadgen_runs_both_scenarios_over_each_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["measure", FACTORY, FACTORY, *QUICKLY, "--backend", "torch", "--record", str(tmp_path)]
    assert cli.main([*asked, "--record-seconds", "1", "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    validate("measure", data)
    runs = data["record"]
    assert [(run["scenario"], run["status"]) for run in runs] == [
        ("SingleStream", STATUS),
        ("Offline", STATUS),
    ] * 2
    assert [run["folder"] for run in runs] == [
        str(tmp_path / "torch" / f"{place}_tiny.py_tiny" / scenario)
        for place in (0, 1)
        for scenario in ("SingleStream", "Offline")
    ]
    for run in runs:
        summary = (Path(run["folder"]) / "mlperf_log_summary.txt").read_text()
        assert f"Scenario : {run['scenario']}\n" in summary
        assert ("Result is : VALID" in summary) is run["valid"]
        assert run["short_of_the_rules"][0] == "1 of 600 seconds"
    assert runs[0]["p90_s"] > 0 and runs[1]["samples_per_s"] > 0
    assert not list(tmp_path.rglob(".*"))  # no half-written folder


@pytest.mark.usefixtures("loadgen")
def test_a_network_that_fails_under_load_leaves_no_record(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    calls = 0\n\n"
        "    def forward(self, x):\n        self.calls += 1\n"
        "        assert self.calls < 20, 'enough'\n        return x\n"
    )
    runs = record.record(
        [f"{source}:Net"], [images(2)], "torch", tmp_path / "r", seconds=60, device=None, threads=1
    )
    assert len(runs) == 2
    for run in runs:
        assert run["not_recorded"].endswith("a call failed: enough") and run["status"] == STATUS
    assert not [path for path in (tmp_path / "r").rglob("*") if path.is_file()]


def test_queries_are_answered_in_batches_and_the_rate_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    answered: list[int] = []
    told: dict[str, Any] = {}

    class Loaded:
        """LoadGen, as far as it is used: asks for seven samples at once."""

        TestMode = TestScenario = type("Names", (), {"Offline": "offline", "PerformanceOnly": "performance"})
        TestSettings = type("Settings", (), {})
        LogSettings = type("Log", (), {"log_output": type("Output", (), {})()})
        QuerySampleResponse = staticmethod(lambda number, data, size: number)
        ConstructSUT = staticmethod(lambda issue, flush: issue)
        ConstructQSL = staticmethod(lambda count, fitting, load, unload: (count, fitting))
        DestroySUT = DestroyQSL = staticmethod(lambda made: None)
        QuerySamplesComplete = staticmethod(answered.extend)

        @staticmethod
        def StartTestWithLogSettings(issue: Any, library: Any, settings: Any, log: Any) -> None:  # noqa: N802  # LoadGen's name
            told.update(vars(settings), outdir=log.log_output.outdir)
            issue([type("Query", (), {"id": number})() for number in range(7)])

    monkeypatch.setitem(sys.modules, "mlperf_loadgen", Loaded)  # type: ignore[arg-type]  # a stand-in
    question = {"scenario": "Offline", "seconds": 2.5, "folder": "there"}
    record._load(tmp_path, question, lambda: calls.append("call"), 0.01, 3)
    assert (calls, answered) == (["call"] * 3, list(range(7)))
    assert (told["min_duration_ms"], told["outdir"], told["scenario"]) == (2500, "there", "offline")
    assert told["offline_expected_qps"] == pytest.approx(1.5 * 3 / 0.01)
    assert told["single_stream_expected_latency_ns"] == 5_000_000


def test_a_process_leaves_its_error(tmp_path: Path) -> None:
    (tmp_path / "question.json").write_text("{}")

    def work(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
        raise MeasurementError("too slow")

    asking.answer(tmp_path, work)
    said = json.loads((tmp_path / "answer.json").read_text())
    assert said == {"error": "MeasurementError", "message": "too slow"}
