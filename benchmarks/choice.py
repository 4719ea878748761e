"""What the default scorer's choice and the published scorer's reach after the same recovery.

    python -m benchmarks.choice --model resnet56 --scoring benchmarks/results/scoring_resnet56_500.json [--seeds 3]

Both choose independently, among the regions of a result of `benchmarks.scoring` and by its losses and savings. Where
they choose different sets, each set is recovered with the default recipe, from the same draws of images. The test set
serves for the last column alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import subjects
from benchmarks.runs import mean_and_spread
from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.pipeline.job import Job
from fxprune.processes.threads import using_threads
from fxprune.reports.tables import render

__all__ = ["main"]

Pair = dict[str, tuple[str, ...]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    scored = _scored(arguments)
    with using_threads(arguments.threads):
        settings = subjects.settings_of(arguments, "iterations") | subjects.recipes_of("fast")
        settings |= {"threads": torch.get_num_threads(), "scored": scored}
        notebook = subjects.Notebook(arguments.out or f"choice_{arguments.model}", settings, arguments.seed)
        test = None if arguments.random else subjects.test_images(arguments.model, arguments.data)
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        pairs: dict[int, Pair] = {}
        for seed in seeds:
            job = _job(seed, arguments)
            known = {region.label: region for region in job.found.regions}
            pairs = _pairs(known, scored)
            for k, pair in _different(pairs, arguments.k).items():
                for scorer, labels in pair.items():
                    regions = [known[label] for label in labels]
                    key = f"{seed}/{','.join(labels)}"
                    run = notebook.once(key, partial(subjects.reach, job, regions, test))
                    print(f"seed {seed}, k {k}, {scorer}: {run['recovery_seconds']:.0f} s", flush=True)
        rows = _rows(pairs, arguments.k, notebook.entries, seeds)
        _print(notebook.put("summary", rows))


def _scored(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the losses of both scorers and the savings.

    Raises:
        OptionError: The file is no result of `benchmarks.scoring`, of another network, or without a reference.
    """
    kept = subjects.kept_result(arguments.scoring)
    rows = {row["scorer"]: row for row in kept["entries"].get("comparison", ())}
    if kept["settings"].get("model") != arguments.model or not rows.get("default", {}).get(
        "reference losses"
    ):
        raise OptionError(
            f"{arguments.scoring} compares no scorers of {arguments.model}; run benchmarks.scoring with reference "
            "losses first"
        )
    row = rows["default"]
    savings = {label: kept["entries"]["savings"][label] for label in row["losses"]}
    return {"default": row["losses"], "practise": row["reference losses"], "savings": savings}


def _job(seed: int, arguments: argparse.Namespace) -> Job:
    subject = subjects.subject_of(
        arguments.model, arguments.images, seed, random=arguments.random, data_path=arguments.data
    )
    recipe = subjects.shortened("fast", arguments.iterations)
    return subjects.job_of(subject, recipe=recipe, seed=seed, device=arguments.device)


def _pairs(known: Mapping[str, Region], scored: Mapping[str, Any]) -> dict[int, Pair]:
    """The labels that each scorer chooses, by k."""
    regions = [known[label] for label in scored["default"]]
    plans = {
        scorer: subjects.independent_plans(regions, scored[scorer], scored["savings"])
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
            runs = [entries[f"{seed}/{','.join(labels)}"] for seed in seeds]
            measured = [run["accuracy"] for run in runs if run["accuracy"] is not None]
            accuracy, spread = mean_and_spread(measured) if measured else (None, None)
            rows.append(
                {
                    "k": k,
                    "scorer": scorer,
                    "chosen": labels,
                    "seeds": len(runs),
                    "joint_loss": mean_and_spread([run["joint_loss"] for run in runs])[0],
                    "loss_after": mean_and_spread([run["loss_after"] for run in runs])[0],
                    "accuracy": accuracy,
                    "accuracy_spread": spread,
                }
            )
    return rows


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    headers = ("k", "scorer", "without", "seeds", "joint loss", "loss after", "top-1, %", "spread")
    cells = [
        (
            row["k"],
            row["scorer"],
            ", ".join(row["chosen"]),
            row.get("seeds"),
            row.get("joint_loss"),
            row.get("loss_after"),
            *(None if row.get(name) is None else 100 * row[name] for name in ("accuracy", "accuracy_spread")),
        )
        for row in rows
    ]
    print(render(headers, cells))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choice", description=(__doc__ or "").split("\n")[0]
    )
    subjects.add_arguments(parser, model="resnet56")
    parser.add_argument("--scoring", required=True, help="a result of benchmarks.scoring")
    parser.add_argument("--k", type=subjects.counts, default=(), help="default: all where the sets differ")
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many, from --seed on (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, help="fewer than the recipe's, for a quick trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
