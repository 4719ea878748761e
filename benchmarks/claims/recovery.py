"""Recovery alone, on fixed regions: adaptors alone, each recipe, and the default without each of its parts, in turns.

    python -m benchmarks.claims.recovery [--quick] [--models resnet20,resnet56] [--images 50,500] [--seeds 3]
    python -m benchmarks.claims.recovery --models resnet20 --variants fast,at-the-tap,adam --out NAME

Recovery is everything between the choice and the recovered network: adaptors fitted for the whole set and folded (but
for `practise`, which mimics from the bare cut), then mimicking. Of the images that are drawn, a fifth is held back as
`fxprune.compress` does, and judges; the test set, or photographs of classes that are not among them, is only reported
on. `--quick` makes fewer draws of the slower networks (`QUICK_DRAWS`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import fx

from benchmarks.common import data, jobs, networks, options
from benchmarks.common.tables import ACCURACY, mean_and_spread, print_rows
from fxprune.calibration.batches import CalibrationSet
from fxprune.errors import OptionError
from fxprune.graph.call import Inputs
from fxprune.graph.regions import Region
from fxprune.memory import memory_kept
from fxprune.options import RECIPES, FitSettings, Recipe
from fxprune.pipeline.job import Job
from fxprune.pipeline.stages import repair
from fxprune.processes.threads import using_threads
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.selection.plans import DropPlan

__all__ = ["REGIONS", "VARIANTS", "main"]

REGIONS: Mapping[str, tuple[str, ...]] = {
    "resnet20": ("layer1.0", "layer1.1", "layer2.2"),
    "resnet56": (
        *("layer1.0", "layer1.2", "layer1.3", "layer1.4", "layer1.5", "layer1.8"),
        *("layer2.1", "layer2.2", "layer2.4", "layer2.5", "layer2.6", "layer2.7"),
    ),
    "mobilenet_v2": ("features.6", "features.10"),
    "efficientnet_lite0": ("blocks.4", "blocks.9"),
}
"""What is cut out of each network, whatever would be chosen: choice must not blur recovery."""
QUICK_DRAWS: Mapping[str, int] = dict.fromkeys(REGIONS, 2) | {"resnet20": 3}
_TEST_FEATURES = 1000


def _mimicking(**settings: Any) -> Callable[[], Recipe]:
    """The default recipe with other settings of mimicking."""
    fast = RECIPES["fast"]
    return lambda: replace(fast, mimic=replace(fast.mimic, **settings))


VARIANTS: Mapping[str, Callable[[], Recipe]] = {
    "adaptors": _mimicking(iterations=0),
    "fast": _mimicking(),
    "practise": lambda: RECIPES["practise"],
    "at-the-tap": _mimicking(near_cuts=False),
    "at-the-tap-without-junctions": _mimicking(near_cuts=False, junctions=False),
    "without-final-fit": _mimicking(final_iterations=0),
    "adam": _mimicking(optimizer="relative-adam"),
    "whole-network": _mimicking(near_cuts=False, changed_only=False),
    "without-kept-values": _mimicking(changed_only=False),
    "running-statistics": _mimicking(batch_norm="eval"),
    "batch-statistics": _mimicking(batch_norm="train"),
    "one-rate": _mimicking(rates=(), learning_rate=1e-2, batch_norm="eval"),
    "without-cutmix": _mimicking(cutmix=False),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the table and leaves JSON in `benchmarks/results/`."""
    arguments = options.parse(_parser(), argv)
    unknown = [name for name in arguments.models if name not in REGIONS]
    unknown += [name for name in arguments.variants if name not in VARIANTS]
    if unknown:
        raise OptionError(
            f"{', '.join(unknown)}: models are {', '.join(REGIONS)}, variants {', '.join(VARIANTS)}"
        )
    recipes = {name: _shortened(VARIANTS[name](), arguments.iterations) for name in arguments.variants}
    with using_threads(arguments.threads), memory_kept():
        settings = options.settings_of(arguments, basis=("random", "device", "seed")) | {
            "regions": {name: arguments.regions or REGIONS[name] for name in arguments.models},
            "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
        }
        kept = options.result_file(arguments, "recovery_quick" if arguments.quick else "recovery", settings)
        for name in arguments.models:
            test = None if arguments.random else networks.test_images(name, arguments.data)
            draws = QUICK_DRAWS[name] if arguments.quick else arguments.seeds
            for count in arguments.images:
                for seed in range(arguments.seed, arguments.seed + draws):
                    for variant, recipe in recipes.items():
                        key = f"{name}/{count}/{seed}/{variant}"
                        run = kept.once(key, partial(_run, name, count, seed, recipe, test, arguments))
                        print(f"{key}: {run['seconds']:.1f} s", flush=True)
        rows = kept.put("summary", _summary(kept.entries))
    columns = {
        "model": "model",
        "images": "images",
        "variant": "variant",
        "draws": "draws",
        "seconds": "seconds",
    }
    held = {"error on held-back images": "held_back_error", "on test images": "test_error"}
    agree = {"agreement, %": ("agreement", 100.0)}
    print_rows(rows, {**columns, **held, **agree, **ACCURACY, "from, %": ("original", 100.0)})


def _parser() -> argparse.ArgumentParser:
    shared = {name: default for name, default in options.NETWORK.items() if name != "images"}
    parser = options.parser("recovery", __doc__, **shared, seeds=3, regions=(), iterations=None)
    parser.add_argument("--models", type=options.words, default=tuple(REGIONS), help="default: all four")
    parser.add_argument("--images", type=options.counts, default=(50, 500), help="default: 50,500")
    parser.add_argument(
        "--variants", type=options.words, default=("adaptors", "fast"), help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer draws of the slower networks")
    return parser


def _shortened(recipe: Recipe, iterations: int | None) -> Recipe:
    """The recipe with at most so many iterations of every fit, for a quick trial."""
    if iterations is None:
        return recipe

    def at_most(fit: FitSettings) -> FitSettings:
        final = min(iterations, fit.final_iterations)
        return replace(fit, iterations=min(iterations, fit.iterations), final_iterations=final)

    return replace(recipe, adaptor=at_most(recipe.adaptor), mimic=at_most(recipe.mimic))


def _run(
    name: str,
    count: int,
    seed: int,
    recipe: Recipe,
    test: data.LabelledImages | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    subject = networks.subject_of(name, count, seed, random=arguments.random, data_path=arguments.data)
    job = jobs.job_of(subject, recipe=recipe, seed=seed, device=arguments.device)
    regions = jobs.regions_named(job, arguments.regions or REGIONS[name])
    begun = time.perf_counter()
    recovered, _ = repair(job, DropPlan((), tuple(regions)))
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "before": asdict(recovered.before),
        "after": asdict(recovered.after),
        "mimicking": [asdict(fit) for fit in recovered.mimicking],
        "test": None if test is None else _tested(job, recovered.graph, regions, test),
    }


def _tested(
    job: Job, small: fx.GraphModule, regions: Sequence[Region], test: data.LabelledImages
) -> dict[str, float]:
    """Accuracy of both networks, how often they agree, and the feature error on some of the test images."""
    original = job.original
    readers = (
        FeatureReader(original.graph, original.tap),
        FeatureReader(small, surviving_tap(original.tap, regions)),
    )
    few = CalibrationSet(Inputs((test.images[:_TEST_FEATURES],)))
    error = mean_feature_loss(*readers, few, device=original.device)
    before, after = (data.predictions(one.to("cpu"), test.images) for one in (original.graph, small))
    return {
        "images": len(test.labels),
        "original": data.share(before == test.labels),
        "accuracy": data.share(after == test.labels),
        "agreement": data.share(before == after),
        "feature_error": error,
    }


def _summary(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each network, count of images and variant: means over the draws, and the spread of accuracies."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for key, entry in entries.items():
        if key != "summary":
            name, count, _, variant = key.split("/")
            groups.setdefault((name, count, variant), []).append(entry)
    return [_row(*group, runs) for group, runs in groups.items()]


def _row(name: str, count: str, variant: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tested = [run["test"] or {} for run in runs]
    accuracy, spread = mean_and_spread(test.get("accuracy") for test in tested)
    held = [run["after"]["held_back"] for run in runs if run["after"]["held_back"] is not None]
    worse = [
        run
        for run in runs
        if run["after"]["held_back"] is not None
        and run["after"]["held_back"]["feature_error"] > run["before"]["held_back"]["feature_error"]
    ]
    return {
        "model": name,
        "images": int(count),
        "variant": variant,
        "draws": len(runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "held_back_error": statistics.fmean(one["feature_error"] for one in held) if held else None,
        "test_error": mean_and_spread(test.get("feature_error") for test in tested)[0],
        "agreement": mean_and_spread(test.get("agreement") for test in tested)[0],
        "accuracy": accuracy,
        "accuracy_spread": spread,
        "original": tested[0].get("original"),
        "ended_worse": len(worse),
        "settings": [[_setting(fit["attempts"][-1]) for fit in run["mimicking"]] for run in runs],
    }


def _setting(attempt: Mapping[str, Any]) -> str:
    return f"{attempt['batch_norm']} {attempt['learning_rate']:g}"


if __name__ == "__main__":
    main()
