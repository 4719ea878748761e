"""Runs of MLPerf's LoadGen over networks, each in a fresh process: `python -m fxprune.measuring.record FOLDER` is one.

LoadGen asks, times and judges; what it writes is left as it is. In MLPerf's terms networks that were cut belong to the
Open division, and what nobody of MLCommons has looked at is unverified.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import MeasurementError, OptionError
from fxprune.files import replacing_folder
from fxprune.measuring import asking
from fxprune.measuring.fresh import keep_inputs, kept_inputs, names_for, network
from fxprune.processes.threads import using_threads
from fxprune.timing import latency

__all__ = ["STATUS", "record", "require_loadgen"]

STATUS = "Open, unverified"
"""What MLPerf's rules have such results called."""

_SCENARIOS = ("SingleStream", "Offline")
# What MLPerf's rules ask for; LoadGen itself asks only for what it is told to.
_SECONDS, _OFFLINE_SAMPLES = 600, 24_576
_DETAIL = "mlperf_log_detail.txt"
_LOG = ":::MLLOG "
_TRIED = 5
_MOST_QUERIES = 1_000_000  # each takes more than a kilobyte


def require_loadgen() -> None:
    """Refuses where LoadGen is missing.

    Raises:
        OptionError: It is not installed.
    """
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise OptionError(
            'a record needs MLPerf\'s LoadGen, which is not installed: pip install "fxprune[record]"'
        )


def record(
    networks: Sequence[str],
    inputs: Sequence[Tensor],
    backend: str,
    folder: Path,
    *,
    seconds: float,
    device: str | None,
    threads: int | None,
) -> list[dict[str, Any]]:
    """LoadGen's SingleStream, with one image a query, and Offline, in batches of the inputs, over each network.

    Args:
        networks: By names as in the shell.
        inputs: The tensors of one call, batch first.
        backend: What runs them.
        folder: Gets what LoadGen writes, under backend, network and scenario; an earlier record there is replaced.
        seconds: How long each run lasts at least.
        device: Of the backends of torch.
        threads: Of the CPU; torch's present number by default.

    Returns:
        For each run the gist, ready for JSON; of one that a network cannot do, why.

    Raises:
        OptionError: LoadGen is missing.
    """
    require_loadgen()
    runs = []
    with tempfile.TemporaryDirectory(prefix="fxprune-") as name:
        work = Path(name)
        for place, (given, found) in enumerate(
            zip(networks, names_for(networks, inputs, backend, work), strict=True)
        ):
            plain = re.sub(r"[^\w.-]+", "_", Path(given).name)
            for scenario in _SCENARIOS:
                told = {"file": given, "scenario": scenario, "status": STATUS}
                part = [x[:1] if x.dim() else x for x in inputs] if scenario == "SingleStream" else inputs
                keep_inputs(part, work)
                target = folder / backend / f"{place}_{plain}" / scenario
                target.parent.mkdir(parents=True, exist_ok=True)
                question = {
                    "network": found,
                    "backend": backend,
                    "device": device,
                    "scenario": scenario,
                    "seconds": seconds,
                    "threads": threads or torch.get_num_threads(),
                }
                try:
                    with replacing_folder(target, replace=True) as written:
                        asked = {**question, "folder": str(written.resolve())}
                        asking.ask(work, asked, __name__, f"LoadGen's {scenario} over {given}")
                        runs.append({**told, "folder": str(target), **_gist(written / _DETAIL, scenario)})
                except MeasurementError as error:
                    runs.append({**told, "not_recorded": str(error)})
    return runs


def _gist(detail: Path, scenario: str) -> dict[str, Any]:
    """What LoadGen found, from its own log."""
    lines = detail.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line.removeprefix(_LOG)) for line in lines if line.startswith(_LOG)]
    found = {event["key"]: event["value"] for event in events}
    seconds = found["effective_min_duration_ms"] / 1e3
    gist: dict[str, Any] = {"valid": found["result_validity"] == "VALID"}
    short = [f"{seconds:g} of {_SECONDS} seconds"] if seconds < _SECONDS else []
    if scenario == "SingleStream":
        gist |= {
            "queries": found["result_query_count"],
            "p90_s": found["result_90.00_percentile_latency_ns"] / 1e9,
            "early_stopping_p90_s": found["early_stopping_latency_ss"] / 1e9,
        }
    else:
        samples = found["effective_samples_per_query"]
        gist |= {"samples": samples, "samples_per_s": found["result_samples_per_second"]}
        short += [f"{samples} of {_OFFLINE_SAMPLES} samples"] if samples < _OFFLINE_SAMPLES else []
    return {**gist, "short_of_the_rules": short}


def _run(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    backend, inputs = question["backend"], kept_inputs(folder)
    place = latency.device_of(backend, question["device"])
    with using_threads(question["threads"]), torch.inference_mode():
        subject = network(question["network"], backend)
        _, ready = latency.prepare(subject, "the network", inputs, backend, place)

        def call() -> None:
            ready.call()
            if place.type == "cuda":
                torch.cuda.synchronize(place)

        try:
            call()
            once = statistics.median(timeit.repeat(call, number=1, repeat=_TRIED))
        except Exception as error:  # the user's network may raise anything
            raise MeasurementError(f"a call failed: {error}") from error
        _load(folder, question, call, once, inputs[0].shape[0])
    return {}


def _load(folder: Path, question: dict[str, Any], call: Callable[[], None], once: float, batch: int) -> None:
    """Lets LoadGen ask for as long as it was told; `once` is what a call takes, about."""
    loadgen = importlib.import_module("mlperf_loadgen")

    def issue(queries: Sequence[Any]) -> None:
        try:
            for first in range(0, len(queries), batch):
                call()
                done = queries[first : first + batch]
                loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(one.id, 0, 0) for one in done])
        except Exception as error:  # may not pass through LoadGen, which cannot be stopped either
            asking.leave(folder, MeasurementError(f"a call failed: {error}"))
            os._exit(1)

    def nothing(*_: Any) -> None:
        """There is nothing to flush or to load: the inputs are always the same."""

    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, question["scenario"])
    settings.mode = loadgen.TestMode.PerformanceOnly
    seconds = question["seconds"]
    settings.min_duration_ms = round(1e3 * seconds)
    # from these it makes up its queries beforehand: too few end the run early, which it then finds invalid
    settings.single_stream_expected_latency_ns = round(1e9 * max(once / 2, seconds / _MOST_QUERIES))
    settings.offline_expected_qps = min(1.5 * batch / once, _MOST_QUERIES / seconds)
    log = loadgen.LogSettings()
    log.log_output.outdir = question["folder"]
    log.log_output.copy_summary_to_stdout = False
    log.enable_trace = False
    system, library = (
        loadgen.ConstructSUT(issue, nothing),
        loadgen.ConstructQSL(batch, batch, nothing, nothing),
    )
    loadgen.StartTestWithLogSettings(system, library, settings, log)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(system)


if __name__ == "__main__":
    asking.answer(Path(sys.argv[1]), _run)
