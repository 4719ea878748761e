"""What `fxprune measure` shows: one description, printed as a table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fxprune.measurements import Latency, LatencyComparison
from fxprune.reports.tables import render

__all__ = ["measurement", "measurement_table"]

# What all networks of a measurement have in common.
_COMMON = ("backend", "device", "batch_shape", "threads")


def measurement(
    files: Sequence[str], results: Sequence[LatencyComparison], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What was measured, ready for JSON; times in seconds.

    Args:
        files: The reference, then the others.
        results: One for each other, against the reference.
        options: How it was measured.
    """
    before = results[0].before
    return {
        **{name: getattr(before, name) for name in _COMMON},
        "options": dict(options),
        "processes": max(1, len(results[0].by_process)),
        "before": _timed(files[0], before),
        "after": [
            {
                **_timed(file, result.after),
                "ratio": result.ratio,
                "ratio_by_process": list(result.by_process) or [result.ratio],
                "interval": asdict(result.interval),
                "saved_s": result.saved_s,
                "verdict": result.verdict,
            }
            for file, result in zip(files[1:], results, strict=True)
        ],
    }


def _timed(file: str, latency: Latency) -> dict[str, Any]:
    own = {name: value for name, value in asdict(latency).items() if name not in _COMMON}
    return {"file": file, **own, "images_per_s": latency.batch_shape[0] / latency.median_s}


def measurement_table(data: Mapping[str, Any]) -> str:
    """Percentiles and throughput of each file, and its ratio to the first with the interval; milliseconds."""
    rows = []
    for one in (data["before"], *data["after"]):
        times = [1e3 * one[name] for name in ("median_s", "p90_s", "p95_s", "p99_s")]
        against = "" if "ratio" not in one else _against(one)
        rows.append((one["file"], *times, one["images_per_s"], one["runs"], against))
    headers = ("network", "median ms", "p90", "p95", "p99", "images/s", "runs", "time / that of the first")
    return (
        f"{render(headers, rows)}\n\n{data['backend']} on {data['device']}, {data['threads']} threads, "
        f"batch shape {'x'.join(map(str, data['batch_shape']))}; {_where(data['processes'])}"
    )


def _against(one: Mapping[str, Any]) -> str:
    low, high, level = (one["interval"][name] for name in ("low", "high", "level"))
    return f"{one['ratio']:.4f} ({level:.0%} {low:.4f} to {high:.4f}), {one['verdict']}"


def _where(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} fresh processes, one after another"
