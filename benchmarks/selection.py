"""What each way of choosing reaches after recovery: independent, greedy, and exact where the sets are few.

    python -m benchmarks.selection --model resnet56 --k 2,4,8,12 [--seeds 3]

Choosing and recovering see the few calibration images only; the test set serves for the last column. Savings are
measured once, so that selections and seeds differ in nothing else. A set chosen twice is recovered once.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import data, subjects
from benchmarks.runs import add_recipe_arguments, mean_and_spread, recipe_from
from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.options import Recipe, Selection
from fxprune.pipeline.job import Job
from fxprune.processes.threads import using_threads
from fxprune.reports.tables import render
from fxprune.scoring.joint_losses import JointLosses
from fxprune.scoring.scorer import fit_all
from fxprune.selection.planner import Planner
from fxprune.selection.plans import BlockScore

__all__ = ["main"]

SELECTIONS: tuple[Selection, ...] = ("independent", "greedy", "exact")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    recipe = recipe_from(arguments)
    with using_threads(arguments.threads):
        settings = subjects.settings_of(arguments) | {
            "recipe": dataclasses.asdict(recipe),
            "threads": torch.get_num_threads(),
        }
        name = arguments.out or f"selection_{arguments.model}"
        notebook = subjects.Notebook(name, settings, arguments.seed)
        test = None if arguments.random else subjects.test_images(arguments.model, arguments.data)
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            _run_seed(seed, recipe, test, notebook, arguments)
        _print(notebook.put("summary", _summary(notebook, arguments)))


def _run_seed(
    seed: int,
    recipe: Recipe,
    test: data.LabelledImages | None,
    notebook: subjects.Notebook,
    arguments: argparse.Namespace,
) -> None:
    subject = subjects.subject_of(
        arguments.model, arguments.images, seed, random=arguments.random, data_path=arguments.data
    )
    job = subjects.job_of(subject, recipe=recipe, seed=seed, device=arguments.device)
    savings = notebook.once("savings", lambda: subjects.savings_of(job))
    begun = time.perf_counter()
    fits = fit_all(job.scorer, [[region] for region in job.found.regions])
    job.fits = {region.label: fit for region, fit in zip(job.found.regions, fits, strict=True)}
    losses = {label: fit.loss for label, fit in job.fits.items()}
    notebook.put(f"{seed}/losses", {"losses": losses, "seconds": time.perf_counter() - begun})
    if test is not None:
        notebook.once("accuracy before", lambda: data.accuracy(subject.model, test.images, test.labels))
    scores = subjects.block_scores(job.found.regions, losses, savings)
    known = {region.label: region for region in job.found.regions}
    for k in arguments.k:
        for selection in SELECTIONS:
            key = f"{seed}/{k}/{selection}"
            choice = notebook.once(key, partial(_choice, job, scores, k, selection))
            if choice["chosen"] is None:
                print(f"seed {seed}, k {k}, {selection}: {choice['refusal']}", flush=True)
                continue
            regions = [known[label] for label in choice["chosen"]]
            reached = notebook.once(
                f"{seed}/set/{','.join(choice['chosen'])}", partial(subjects.reach, job, regions, test)
            )
            print(
                f"seed {seed}, k {k}, {selection}: {_percent(reached['accuracy'])} without "
                f"{', '.join(choice['chosen'])}",
                flush=True,
            )


def _choice(job: Job, scores: Sequence[BlockScore], k: int, selection: Selection) -> dict[str, Any]:
    """Choose a set; a selection that cannot is noted with its reason."""
    known: dict[tuple[str, ...], float] = {}
    losses = JointLosses(job.scorer, job.fits)

    def joint_loss(sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        found = losses(sets, plan)
        known.update(
            {tuple(r.label for r in regions): loss for regions, loss in zip(sets, found, strict=True)}
        )
        return found

    planner = Planner(scores, joint_loss, selection)
    begun = time.perf_counter()
    try:
        chosen = planner.of_size(k)
    except OptionError as refusal:
        return {"chosen": None, "refusal": str(refusal)}
    labels = tuple(region.label for region in chosen)
    return {
        "chosen": list(labels),
        "seconds": time.perf_counter() - begun,
        "sets_scored": len(known),
        "saving": planner.saving(chosen),
        "estimate": known.get(labels),
    }


def _summary(notebook: subjects.Notebook, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each k and selection, over the seeds."""
    rows = []
    for k in arguments.k:
        for selection in SELECTIONS:
            runs = []
            for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                choice = notebook.entries[f"{seed}/{k}/{selection}"]
                if choice["chosen"] is not None:
                    runs.append(choice | notebook.entries[f"{seed}/set/{','.join(choice['chosen'])}"])
            if runs:
                rows.append({"k": k, "selection": selection} | _row(runs))
    return rows


def _row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("saving", "joint_loss", "loss_after", "seconds", "recovery_seconds", "sets_scored")
    row: dict[str, Any] = {name: mean_and_spread([run[name] for run in runs])[0] for name in names}
    measured = [run["accuracy"] for run in runs if run["accuracy"] is not None]
    row["accuracy"], row["accuracy_spread"] = mean_and_spread(measured) if measured else (None, None)
    return row | {"seeds": len(runs), "chosen": [", ".join(run["chosen"]) for run in runs]}


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    headers = ("k", "selection", "seeds", "sum of savings, %", "joint loss", "loss after", "choosing, s", "sets scored",
               "recovery, s", "top-1", "spread")  # fmt: skip
    cells = [
        (
            row["k"],
            row["selection"],
            row["seeds"],
            100 * row["saving"],
            row["joint_loss"],
            row["loss_after"],
            row["seconds"],
            row["sets_scored"],
            row["recovery_seconds"],
            _percent(row["accuracy"]),
            _percent(row["accuracy_spread"]),
        )
        for row in rows
    ]
    print(render(headers, cells))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection", description=(__doc__ or "").split("\n")[0]
    )
    subjects.add_arguments(parser, model="resnet56")
    parser.add_argument("--k", type=subjects.counts, default=(2, 4, 8, 12), help="default: 2,4,8,12")
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many, from --seed on (default: %(default)s)"
    )
    add_recipe_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
