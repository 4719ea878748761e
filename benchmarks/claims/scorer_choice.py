"""What the default scorer's choice and the published scorer's reach after the same recovery.

    python -m benchmarks.claims.scorer_choice --model resnet56 --scoring benchmarks/results/scoring_resnet56_500.json

Both choose independently, among the regions of a result of `benchmarks.claims.scoring` and by its losses and savings.
Where they choose different sets, each set is recovered with the default recipe, from the same draws of images. The test
set serves for the last column alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.common import jobs, networks, options
from benchmarks.common.result_file import read_result
from benchmarks.common.tables import ACCURACY, mean_and_spread, print_rows
from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.memory import memory_kept
from fxprune.processes.threads import using_threads

__all__ = ["main"]

Pair = dict[str, tuple[str, ...]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the table and leaves JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    scored = _scored(arguments)
    recipe = options.shortened("fast", arguments.iterations, arguments.iterations)
    with using_threads(arguments.threads), memory_kept():
        settings = options.settings_of(arguments, recipes=(recipe,)) | {"scored": scored}
        kept = options.result_file(arguments, f"scorer_choice_{arguments.model}", settings)
        test = None if arguments.random else networks.test_images(arguments.model, arguments.data)
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        pairs: dict[int, Pair] = {}
        for seed in seeds:
            job = jobs.job_for(arguments, seed, recipe)
            pairs = _pairs(jobs.regions_named(job, tuple(scored["default"])), scored)
            for k, pair in _different(pairs, arguments.k).items():
                for scorer, labels in pair.items():
                    regions = jobs.regions_named(job, labels)
                    run = kept.once(_key(seed, labels), partial(jobs.reach, job, regions, test))
                    print(f"seed {seed}, k {k}, {scorer}: {run['recovery_seconds']:.0f} s", flush=True)
        rows = kept.put("summary", _rows(pairs, arguments.k, kept.entries, seeds))
    columns = {"k": "k", "scorer": "scorer", "without": "chosen", "seeds": "seeds"}
    losses = {"joint loss": "joint_loss", "loss after": "loss_after"}
    print_rows(rows, {**columns, **losses, **ACCURACY})


def _key(seed: int, labels: Sequence[str]) -> str:
    return f"{seed}/{','.join(labels)}"


def _scored(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reads the losses of both scorers and the savings.

    Raises:
        OptionError: The file is no result of `benchmarks.claims.scoring`, of another network, or without a reference.
    """
    kept = read_result(arguments.scoring)
    rows = {row["scorer"]: row for row in kept["entries"].get("comparison", ())}
    row = rows.get("default", {})
    if kept["settings"].get("model") != arguments.model or not row.get("reference losses"):
        raise OptionError(
            f"{arguments.scoring} compares no scorers of {arguments.model}; run benchmarks.claims.scoring with "
            "reference losses first"
        )
    savings = {label: kept["entries"]["savings"][label] for label in row["losses"]}
    return {"default": row["losses"], "practise": row["reference losses"], "savings": savings}


def _pairs(regions: Sequence[Region], scored: Mapping[str, Any]) -> dict[int, Pair]:
    """The labels that each scorer chooses, by k."""
    plans = {
        scorer: jobs.independent_plans(regions, scored[scorer], scored["savings"])
        for scorer in ("default", "practise")
    }
    sizes = range(min(map(len, plans.values())))
    return {k + 1: {scorer: tuple(r.label for r in plans[scorer][k]) for scorer in plans} for k in sizes}


def _different(pairs: Mapping[int, Pair], wanted: Sequence[int]) -> dict[int, Pair]:
    return {
        k: pair
        for k, pair in pairs.items()
        if pair["default"] != pair["practise"] and (not wanted or k in wanted)
    }


def _rows(
    pairs: Mapping[int, Pair], wanted: Sequence[int], entries: Mapping[str, Any], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One row for each k: the set where both choose the same, else what each reaches."""
    different = _different(pairs, wanted)
    rows: list[dict[str, Any]] = []
    for k, pair in pairs.items():
        if k not in different:
            same = pair["default"] == pair["practise"]
            rows.append({"k": k, "scorer": "both" if same else "not recovered", "chosen": pair["default"]})
            continue
        for scorer, labels in pair.items():
            runs = [entries[_key(seed, labels)] for seed in seeds]
            means = {
                n: mean_and_spread(run[n] for run in runs) for n in ("joint_loss", "loss_after", "accuracy")
            }
            figures = {name: mean for name, (mean, _) in means.items()}
            figures["accuracy_spread"] = means["accuracy"][1]
            rows.append({"k": k, "scorer": scorer, "chosen": labels, "seeds": len(runs), **figures})
    return rows


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = {**options.NETWORK, "model": "resnet56", "seeds": 3, "iterations": None}
    parser = options.parser("scorer_choice", __doc__, **defaults)
    parser.add_argument("--scoring", required=True, help="a result of benchmarks.claims.scoring")
    parser.add_argument("--k", type=options.counts, default=(), help="default: all where the sets differ")
    return options.parse(parser, argv)


if __name__ == "__main__":
    main()
