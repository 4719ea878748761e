"""What `fxprune measure` shows: one description, printed as a table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fxprune.measurements import Latency, LatencyComparison
from fxprune.reports.tables import render
from fxprune.runtimes.onnxruntime import elsewhere

__all__ = ["all_measured", "measurement", "measurement_table"]

# What all networks of a measurement have in common.
_COMMON = ("backend", "device", "batch_shape", "threads")
# What decides about the speed of a backend and is said in the table too.
_TOLD = ("compiled", "dtype", "memory_format", "tf32", "tf32_convolutions", "tf32_matmuls")
_PROVIDER_TOLD = ("cudnn_conv_algo_search", "use_tf32")


def measurement(
    networks: Sequence[str],
    results: Sequence[LatencyComparison],
    options: Mapping[str, Any],
    conditions: Sequence[Mapping[str, Any]],
    cards: Sequence[Mapping[str, Any] | None],
) -> dict[str, Any]:
    """What was measured on one backend, ready for JSON; times in seconds.

    Args:
        networks: The reference, then the others.
        results: One for each other, against the reference.
        options: How it was measured.
        conditions: What the runtime was told, and what it says of each network.
        cards: What the graphics card said of its clocks in each process.
    """
    before = results[0].before
    first, *others = [
        {**_timed(name, side), "conditions": dict(told)}
        for name, side, told in zip(networks, (before, *(r.after for r in results)), conditions, strict=True)
    ]
    return {
        **{name: getattr(before, name) for name in _COMMON},
        "options": {**options, **conditions[0]},
        "processes": len(cards),
        "gpu": [dict(card) for card in cards if card is not None],
        "before": first,
        "after": [
            {
                **other,
                "ratio": result.ratio,
                "ratio_by_process": list(result.by_process) or [result.ratio],
                "interval": asdict(result.interval),
                "saved_s": result.saved_s,
                "verdict": result.verdict,
            }
            for other, result in zip(others, results, strict=True)
        ],
    }


def all_measured(measured: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> dict[str, Any]:
    """The measurements on several backends as one: the first, which holds the others.

    Args:
        measured: What `measurement` made for each backend, at least one.
        failed: Why others were not measured, by backend.
    """
    missing = [{"backend": backend, "reason": reason} for backend, reason in failed.items()]
    return {**measured[0], "others": [dict(one) for one in measured[1:]], "not_measured": missing}


def _timed(file: str, latency: Latency) -> dict[str, Any]:
    own = {name: value for name, value in asdict(latency).items() if name not in _COMMON}
    return {"file": file, **own, "images_per_s": latency.batch_shape[0] / latency.median_s}


def measurement_table(data: Mapping[str, Any]) -> str:
    """What `all_measured` holds, backend by backend."""
    missing = (f"{one['backend']}: not measured: {one['reason']}" for one in data["not_measured"])
    return "\n\n".join([*map(_table, (data, *data["others"])), *missing])


def _table(data: Mapping[str, Any]) -> str:
    """Percentiles and throughput of each network, and its ratio to the first with the interval; milliseconds."""
    rows = []
    networks = (data["before"], *data["after"])
    for one in networks:
        times = [1e3 * one[name] for name in ("median_s", "p90_s", "p95_s", "p99_s")]
        against = "" if "ratio" not in one else _against(one)
        rows.append((one["file"], *times, one["images_per_s"], one["runs"], against))
    headers = ("network", "median ms", "p90", "p95", "p99", "images/s", "runs", "time / that of the first")
    told = [f"{name} {data['options'][name]}" for name in _TOLD if name in data["options"]]
    told += [
        f"{name} {value}"
        for name, value in data["options"].get("provider_options", {}).items()
        if name in _PROVIDER_TOLD
    ]
    lines = [
        f"{data['backend']} on {data['device']}, {data['threads']} threads, batch shape "
        f"{'x'.join(map(str, data['batch_shape']))}; {_where(data['processes'])}",
        *([", ".join(told)] if told else []),
        *(f"{one['file']}: {others}" for one in networks if (others := _elsewhere(one["conditions"]))),
        *map(_card, data["gpu"]),
        *([""] if "record" in data else []),
        *map(_recorded, data.get("record", ())),
    ]
    return "\n".join([render(headers, rows), "", *lines])


def _elsewhere(conditions: Mapping[str, Any]) -> str:
    """Which nodes another provider runs than the one that was asked for."""
    nodes = conditions.get("nodes", {})
    return nodes if isinstance(nodes, str) else elsewhere(nodes, conditions.get("provider", ""))


def _card(card: Mapping[str, Any]) -> str:
    """How the card's clocks were before and after a process's rounds."""
    before, after = card["before"], card["after"]
    for state in (before, after):
        if isinstance(state, str):
            return f"clocks of the card: {state}"
    slowed = sorted({*before["slowed_by"], *after["slowed_by"]})
    changes = (f"{name} {before[name]} to {after[name]}" for name in before if name != "slowed_by")
    return f"card, before and after: {', '.join(changes)}; slowed by {', '.join(slowed) or 'nothing'}"


def _recorded(run: Mapping[str, Any]) -> str:
    """A run of LoadGen in one line."""
    named = f"MLPerf LoadGen {run['scenario']}, {run['status']}: {run['file']}"
    if "not_recorded" in run:
        return f"{named}: not recorded: {run['not_recorded']}"
    if run["scenario"] == "SingleStream":
        said = f"90th percentile {1e3 * run['p90_s']:.4g} ms over {run['queries']} queries"
    else:
        said = f"{run['samples_per_s']:.4g} samples/s over {run['samples']} samples"
    short = run["short_of_the_rules"]
    return f"{named}: {said}, {'valid' if run['valid'] else 'INVALID'}" + (
        f", shorter than MLPerf asks ({', '.join(short)})" if short else ""
    )


def _against(one: Mapping[str, Any]) -> str:
    low, high, level = (one["interval"][name] for name in ("low", "high", "level"))
    return f"{one['ratio']:.4f} ({level:.0%} {low:.4f} to {high:.4f}), {one['verdict']}"


def _where(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} fresh processes, one after another"
