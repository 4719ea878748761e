"""What the recovery of each recipe reaches from the same cut, and in what time: in turns, on the same images.

    python -m benchmarks.claims.recovery --model resnet20 --regions layer1.0,layer1.1,layer2.2 [--images 500]

Recovery is everything between the choice and the recovered network: `fast` fits and folds the adaptors of the whole set
first, `practise` mimics from the bare cut. The test set serves for the accuracy alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.common import data, jobs, networks, options
from benchmarks.common.tables import ACCURACY, mean_and_spread, print_rows
from fxprune.options import RECIPES, Recipe
from fxprune.processes.threads import using_threads

__all__ = ["main"]

REGIONS = ("layer1.0", "layer1.1", "layer2.2")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    defaults = {**options.NETWORK, "model": "resnet20", "regions": REGIONS, "seeds": 3, "iterations": None}
    arguments = options.parse(options.parser("recovery", __doc__, **defaults), argv)
    recipes = [options.shortened(name, arguments.iterations, arguments.iterations) for name in RECIPES]
    with using_threads(arguments.threads):
        settings = options.settings_of(arguments, "regions", recipes=recipes)
        kept = options.result_file(arguments, f"recovery_{arguments.model}_{arguments.images}", settings)
        test = None if arguments.random else networks.test_images(arguments.model, arguments.data)
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        for seed in seeds:
            for recipe in recipes:
                run = kept.once(f"{seed}/{recipe.name}", partial(_run, recipe, seed, test, arguments))
                print(f"seed {seed}, {recipe.name}: {run['recovery_seconds']:.1f} s", flush=True)
        rows = kept.put("summary", _summary(kept.entries, seeds))
    columns = {"recipe": "recipe", "seeds": "seeds", "seconds": "seconds", "of practise": "share"}
    print_rows(rows, {**columns, "loss after": "loss_after", **ACCURACY})


def _run(
    recipe: Recipe, seed: int, test: data.LabelledImages | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    job = jobs.job_for(arguments, seed, recipe)
    return jobs.reach(job, jobs.regions_named(job, arguments.regions), test)


def _summary(entries: Mapping[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each recipe; times as shares of the published recovery's from the same cut and images."""
    rows = []
    for recipe in RECIPES:
        runs = [entries[f"{seed}/{recipe}"] for seed in seeds]
        pairs = zip(runs, (entries[f"{seed}/practise"] for seed in seeds), strict=True)
        shares = [run["recovery_seconds"] / published["recovery_seconds"] for run, published in pairs]
        accuracy, spread = mean_and_spread(run["accuracy"] for run in runs)
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


if __name__ == "__main__":
    main()
