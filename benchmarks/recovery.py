"""What the recovery of each recipe reaches from the same cut, and in what time: in turns, on the same images.

    python -m benchmarks.recovery --model resnet20 --regions layer1.0,layer1.1,layer2.2 [--images 500] [--seeds 3]

Recovery is everything between the choice and the recovered network: `fast` fits and folds the adaptors of the whole set
first, `practise` mimics from the bare cut. The test set serves for the accuracy alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import data, subjects
from benchmarks.runs import mean_and_spread
from fxprune.errors import OptionError
from fxprune.options import RECIPES
from fxprune.processes.threads import using_threads
from fxprune.reports.tables import render

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    with using_threads(arguments.threads):
        settings = subjects.settings_of(arguments, "regions", "iterations") | subjects.recipes_of(*RECIPES)
        settings["threads"] = torch.get_num_threads()
        name = arguments.out or f"recovery_{arguments.model}_{arguments.images}"
        notebook = subjects.Notebook(name, settings, arguments.seed)
        test = None if arguments.random else subjects.test_images(arguments.model, arguments.data)
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        for seed in seeds:
            for recipe in RECIPES:
                run = notebook.once(f"{seed}/{recipe}", partial(_run, recipe, seed, test, arguments))
                print(f"seed {seed}, {recipe}: {run['recovery_seconds']:.1f} s", flush=True)
        _print(notebook.put("summary", _summary(notebook.entries, seeds)))


def _run(
    recipe: str, seed: int, test: data.LabelledImages | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Recover once.

    Raises:
        OptionError: A region is not there.
    """
    subject = subjects.subject_of(
        arguments.model, arguments.images, seed, random=arguments.random, data_path=arguments.data
    )
    shortened = subjects.shortened(recipe, arguments.iterations)
    job = subjects.job_of(subject, recipe=shortened, seed=seed, device=arguments.device)
    known = {region.label: region for region in job.found.regions}
    absent = [label for label in arguments.regions if label not in known]
    if absent:
        raise OptionError(
            f"{arguments.model} has no region {', '.join(absent)}; choose from {', '.join(known)}"
        )
    return subjects.reach(job, [known[label] for label in arguments.regions], test)


def _summary(entries: Mapping[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each recipe; times as shares of the published recovery's from the same cut and images."""
    rows = []
    for recipe in RECIPES:
        runs = [entries[f"{seed}/{recipe}"] for seed in seeds]
        shares = [
            run["recovery_seconds"] / entries[f"{seed}/practise"]["recovery_seconds"]
            for run, seed in zip(runs, seeds, strict=True)
        ]
        measured = [run["accuracy"] for run in runs if run["accuracy"] is not None]
        accuracy, spread = mean_and_spread(measured) if measured else (None, None)
        rows.append(
            {
                "recipe": recipe,
                "seeds": len(runs),
                "seconds": statistics.median(run["recovery_seconds"] for run in runs),
                "share": statistics.median(shares),
                "shares": shares,
                "loss_after": statistics.fmean(run["loss_after"] for run in runs),
                "accuracy": accuracy,
                "accuracy_spread": spread,
            }
        )
    return rows


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    headers = ("recipe", "seeds", "seconds", "of practise", "loss after", "top-1, %", "spread")
    cells = [
        (
            row["recipe"],
            row["seeds"],
            row["seconds"],
            row["share"],
            row["loss_after"],
            *(None if row[name] is None else 100 * row[name] for name in ("accuracy", "accuracy_spread")),
        )
        for row in rows
    ]
    print(render(headers, cells))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery", description=(__doc__ or "").split("\n")[0]
    )
    subjects.add_arguments(parser, model="resnet20")
    parser.add_argument(
        "--regions",
        type=subjects.words,
        default=("layer1.0", "layer1.1", "layer2.2"),
        help="to cut; default: layer1.0,layer1.1,layer2.2",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many, from --seed on (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, help="fewer than the recipes', for a quick trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
