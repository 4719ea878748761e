"""Whether a noisy machine changes the choice: whole choices, latencies measured anew each time.

    python -m benchmarks.stability --model resnet20 --k 3 --runs 10 [--backend onnxruntime-cpu]

Images and seed stay the same, so that nothing but the clock can make two runs differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import subjects
from benchmarks.runs import mean_and_spread
from fxprune.pipeline.job import Clock
from fxprune.pipeline.stages import choose, score
from fxprune.processes.threads import using_threads
from fxprune.reports.tables import render
from fxprune.timing.latency import BACKENDS
from fxprune.timing.savings import SCORING

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the tables and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    subject = subjects.subject_of(
        arguments.model, arguments.images, arguments.seed, random=arguments.random, data_path=arguments.data
    )
    with using_threads(arguments.threads):
        settings = {
            **subjects.settings_of(arguments, "k", "backend", "selection"),
            **subjects.recipes_of("fast"),
            "timing": dataclasses.asdict(SCORING),
            "threads": torch.get_num_threads(),
        }
        name = arguments.out or f"stability_{arguments.model}_k{arguments.k}_{arguments.backend}"
        notebook = subjects.Notebook(name, settings, arguments.seed)
        for index in range(arguments.runs):
            run = notebook.once(f"run/{index}", lambda: _choose(subject, arguments))
            print(f"run {index}: {', '.join(run['chosen'])} in {run['seconds']:.1f} s", flush=True)
        runs = [notebook.entries[f"run/{index}"] for index in range(arguments.runs)]
        _print(runs, notebook.put("summary", _summary(runs)))


def _choose(subject: subjects.Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trace, measure, score and choose, as `compress` does."""
    begun, clock = time.perf_counter(), Clock()
    job = subjects.job_of(
        subject,
        seed=arguments.seed,
        device=arguments.device,
        k=arguments.k,
        selection=arguments.selection,
        backend=arguments.backend,
    )
    scores = score(job, clock)
    with clock("selection"):
        plan = choose(job, scores)
    return {
        "chosen": list(plan.chosen),
        "seconds": time.perf_counter() - begun,
        "durations": clock.seconds,
        "losses": {s.region.label: s.recovery_loss for s in scores},
        "savings": {s.region.label: s.latency.saving for s in scores},
        "distinguishable": {s.region.label: s.latency.distinguishable for s in scores},
    }


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often each set was chosen, and how far the scores of each region spread."""
    chosen = Counter(", ".join(sorted(run["chosen"])) for run in runs)
    regions = {}
    for label in runs[0]["losses"]:
        savings = [run["savings"][label] for run in runs]
        scores = [
            run["losses"][label] / run["savings"][label] for run in runs if run["distinguishable"][label]
        ]
        mean, spread = mean_and_spread(scores) if scores else (math.nan, math.nan)
        regions[label] = {
            "saving": statistics.fmean(savings),
            "saving_spread": mean_and_spread(savings)[1],
            "score": mean,
            "relative_score_spread": spread / mean if scores else None,
            "beyond_noise": len(scores),
            "chosen": sum(label in run["chosen"] for run in runs),
        }
    return {"sets": dict(chosen.most_common()), "same": chosen.most_common(1)[0][1], "regions": regions}


def _print(runs: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    headers = ("region", "chosen", "saving, %", "spread", "score", "relative spread", "beyond noise")
    rows = [
        (
            label,
            row["chosen"],
            100 * row["saving"],
            100 * row["saving_spread"],
            row["score"],
            row["relative_score_spread"],
            row["beyond_noise"],
        )
        for label, row in summary["regions"].items()
    ]
    print(render(headers, rows))
    for chosen, count in summary["sets"].items():
        print(f"{count} of {len(runs)} runs chose {chosen}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stability", description=(__doc__ or "").split("\n")[0]
    )
    subjects.add_arguments(parser, model="resnet20")
    parser.add_argument("--k", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--backend", default="torch", choices=BACKENDS, help="default: %(default)s")
    parser.add_argument(
        "--selection", choices=("greedy", "independent", "exact"), help="default: the recipe's"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
