"""Whether a noisy machine changes the choice: whole choices, latencies measured anew each time.

    python -m benchmarks.claims.stability --model resnet20 --k 3 --runs 10 [--backend onnxruntime-cpu]

Images and seed stay the same, so that nothing but the clock can make two runs differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from benchmarks.common import jobs, networks, options
from benchmarks.common.tables import mean_and_spread, print_rows
from fxprune.backends import BACKENDS
from fxprune.options import Selection, recipe_named
from fxprune.pipeline.stages import choose, score
from fxprune.processes.threads import using_threads
from fxprune.timing.savings import SCORING

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the tables and leaves JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    subject = jobs.subject_for(arguments, arguments.seed)
    with using_threads(arguments.threads):
        settings = options.settings_of(
            arguments, "k", "backend", "selection", recipes=(recipe_named("fast"),)
        ) | {"timing": dataclasses.asdict(SCORING)}
        name = f"stability_{arguments.model}_k{arguments.k}_{arguments.backend}"
        kept = options.result_file(arguments, name, settings)
        for index in range(arguments.runs):
            run = kept.once(f"run/{index}", lambda: _choose(subject, arguments))
            print(f"run {index}: {', '.join(run['chosen'])} in {run['seconds']:.1f} s", flush=True)
        runs = [kept.entries[f"run/{index}"] for index in range(arguments.runs)]
        _print(kept.put("summary", _summary(runs)), arguments.runs)


def _choose(subject: networks.Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """Traces, measures, scores and chooses, as `compress` does."""
    begun = time.perf_counter()
    job = jobs.job_of(
        subject,
        seed=arguments.seed,
        device=arguments.device,
        k=arguments.k,
        selection=arguments.selection,
        backend=arguments.backend,
    )
    scores = score(job)
    plan = choose(job, scores)
    return {
        "chosen": list(plan.chosen),
        "seconds": time.perf_counter() - begun,
        "durations": job.stage.seconds,
        "losses": {s.region.label: s.recovery_loss for s in scores},
        "savings": {s.region.label: s.cost.saving for s in scores},
        "distinguishable": {s.region.label: s.cost.distinguishable for s in scores},
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
        mean, spread = mean_and_spread(scores)
        regions[label] = {
            "saving": statistics.fmean(savings),
            "saving_spread": mean_and_spread(savings)[1],
            "score": mean,
            "relative_score_spread": None if mean is None or spread is None else spread / mean,
            "beyond_noise": len(scores),
            "chosen": sum(label in run["chosen"] for run in runs),
        }
    return {"sets": dict(chosen.most_common()), "same": chosen.most_common(1)[0][1], "regions": regions}


def _print(summary: Mapping[str, Any], runs: int) -> None:
    rows = [{"region": label, **row} for label, row in summary["regions"].items()]
    savings = {"saving, %": ("saving", 100.0), "spread": ("saving_spread", 100.0)}
    scores = {"score": "score", "relative spread": "relative_score_spread", "beyond noise": "beyond_noise"}
    print_rows(rows, {"region": "region", "chosen": "chosen", **savings, **scores})
    for chosen, count in summary["sets"].items():
        print(f"{count} of {runs} runs chose {chosen}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("stability", __doc__, **{**options.NETWORK, "model": "resnet20", "k": 3})
    parser.add_argument("--runs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--backend", default="torch", choices=BACKENDS, help="default: %(default)s")
    parser.add_argument("--selection", choices=get_args(Selection), help="default: the recipe's")
    return options.parse(parser, argv)


if __name__ == "__main__":
    main()
