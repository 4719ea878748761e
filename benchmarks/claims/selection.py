"""What each way of choosing reaches after recovery: independent, greedy, and exact where the sets are few.

    python -m benchmarks.claims.selection --model resnet56 --k 2,4,8,12 [--seeds 3]

Choosing and recovering see the few calibration images only; the test set serves for the last column. Savings are
measured once, so that selections and seeds differ in nothing else. A set chosen twice is recovered once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.common import data, jobs, networks, options
from benchmarks.common.result_file import ResultFile
from benchmarks.common.tables import ACCURACY, Columns, mean_and_spread, print_rows
from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.options import Recipe, Selection
from fxprune.pipeline.job import Job
from fxprune.processes.threads import using_threads
from fxprune.scoring.joint_losses import JointLosses
from fxprune.scoring.scorer import fit_all
from fxprune.selection.planner import Planner
from fxprune.selection.plans import BlockScore

__all__ = ["main"]

SELECTIONS: tuple[Selection, ...] = ("independent", "greedy", "exact")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the tables and leaves JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    recipe = options.shortened(arguments.recipe, arguments.adaptor_iterations, arguments.mimic_iterations)
    with using_threads(arguments.threads):
        settings = options.settings_of(arguments, recipes=(recipe,))
        kept = options.result_file(arguments, f"selection_{arguments.model}", settings)
        test = None if arguments.random else networks.test_images(arguments.model, arguments.data)
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            _run_seed(seed, recipe, test, kept, arguments)
        _print(kept.put("summary", _summary(kept.entries, arguments)))


def _run_seed(
    seed: int,
    recipe: Recipe,
    test: data.LabelledImages | None,
    kept: ResultFile,
    arguments: argparse.Namespace,
) -> None:
    subject = jobs.subject_for(arguments, seed)
    job = jobs.job_of(subject, recipe=recipe, seed=seed, device=arguments.device)
    savings = kept.once("savings", lambda: jobs.savings_of(job))
    begun = time.perf_counter()
    fits = fit_all(job.scorer, [[region] for region in job.discovery.regions])
    job.fits = {region.label: fit for region, fit in zip(job.discovery.regions, fits, strict=True)}
    losses = {label: fit.loss for label, fit in job.fits.items()}
    kept.put(f"{seed}/losses", {"losses": losses, "seconds": time.perf_counter() - begun})
    if test is not None:
        kept.once("accuracy before", lambda: data.accuracy(subject.model, test.images, test.labels))
    scores = jobs.block_scores(job.discovery.regions, losses, savings)
    for k in arguments.k:
        for selection in SELECTIONS:
            title = f"seed {seed}, k {k}, {selection}"
            choice = kept.once(f"{seed}/{k}/{selection}", partial(_choice, job, scores, k, selection))
            if choice["chosen"] is None:
                print(f"{title}: {choice['refusal']}", flush=True)
                continue
            chosen = ",".join(choice["chosen"])
            regions = jobs.regions_named(job, choice["chosen"])
            reached = kept.once(f"{seed}/set/{chosen}", partial(jobs.reach, job, regions, test))
            print(f"{title}: loss {reached['loss_after']:.4g} without {chosen}", flush=True)


def _choice(job: Job, scores: Sequence[BlockScore], k: int, selection: Selection) -> dict[str, Any]:
    """Chooses a set; a selection that cannot is noted with its reason."""
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


def _summary(entries: Mapping[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each k and selection, over the seeds."""
    rows = []
    for k in arguments.k:
        for selection in SELECTIONS:
            seeds = range(arguments.seed, arguments.seed + arguments.seeds)
            choices = {seed: entries[f"{seed}/{k}/{selection}"] for seed in seeds}
            runs = [
                choice | entries[f"{seed}/set/{','.join(choice['chosen'])}"]
                for seed, choice in choices.items()
                if choice["chosen"] is not None
            ]
            if runs:
                rows.append({"k": k, "selection": selection} | _row(runs))
    return rows


def _row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("saving", "joint_loss", "loss_after", "seconds", "recovery_seconds", "sets_scored")
    row: dict[str, Any] = {name: mean_and_spread(run[name] for run in runs)[0] for name in names}
    row["accuracy"], row["accuracy_spread"] = mean_and_spread(run["accuracy"] for run in runs)
    return row | {"seeds": len(runs), "chosen": [", ".join(run["chosen"]) for run in runs]}


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    names: Columns = {
        "k": "k",
        "selection": "selection",
        "seeds": "seeds",
        "sum of savings, %": ("saving", 100.0),
    }
    losses = {"joint loss": "joint_loss", "loss after": "loss_after"}
    effort = {"choosing, s": "seconds", "sets scored": "sets_scored", "recovery, s": "recovery_seconds"}
    print_rows(rows, {**names, **losses, **effort, **ACCURACY})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    trial = {"recipe": "fast", "adaptor_iterations": None, "mimic_iterations": None}
    defaults = {**options.NETWORK, **trial, "model": "resnet56", "seeds": 3}
    parser = options.parser("selection", __doc__, **defaults)
    parser.add_argument("--k", type=options.counts, default=(2, 4, 8, 12), help="default: 2,4,8,12")
    return options.parse(parser, argv)


if __name__ == "__main__":
    main()
