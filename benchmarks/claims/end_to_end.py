"""Wall time and peak memory of the whole of `compress`, stage by stage, and how they grow.

    python -m benchmarks.claims.end_to_end --model resnet56 --k 8 [--timed-iterations 20]
                                           [--growth images,blocks,resolution] [--growth-only]

`recipe="practise"` runs in full with `--timed-iterations 0`. Else it runs twice, with no iterations and with n, and the
stages that iterate are scaled: `t(0) + N (t(n) - t(0)) / n`; the rest is taken from the first run. Such rows say so.
Each case runs in a process of its own, so that peak memory is its own; it holds the interpreter and torch too.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import fxprune
from benchmarks.common import networks, options
from benchmarks.common.result_file import ResultFile
from benchmarks.common.tables import print_rows
from fxprune.options import RECIPES, Recipe
from fxprune.processes.threads import using_threads
from fxprune.timing.environment import peak_memory

__all__ = ["Case", "main", "run", "scaled"]

STAGES = ("trace", "latency", "scoring", "selection", "recovery", "measurement")
ITERATING = {"scoring": "adaptor", "recovery": "mimic"}
GROWTH = ("images", "blocks", "resolution")
IMAGE_COUNTS = (100, 250, 500)
BLOCK_MODELS = ("resnet20", "resnet56")
SIZES = (96, 160, 224)


@dataclasses.dataclass(frozen=True)
class Case:
    """One whole compression.

    Attributes:
        model: See `benchmarks.common.networks.MODELS`.
        k: Regions to drop.
        images: To compress with.
        recipe: Name of the recipe.
        random: Whether weights and images are noise.
        device: Where to work.
        threads: Of torch; None for its own number.
        seed: Of everything.
        size: Side of the images, None for the network's own.
        iterations: Of adaptors and mimicking both, None for the recipe's.
        data: Folder of the data.
    """

    model: str
    k: int
    images: int
    recipe: str
    random: bool
    device: str
    threads: int | None
    seed: int
    size: int | None = None
    iterations: int | None = None
    data: str | None = None

    @property
    def title(self) -> str:
        """What tells this case from the others of a result."""
        size = networks.MODELS[self.model].size if self.size is None else self.size
        weights = ", random" if self.random else ""
        return f"{self.model} k={self.k}, {self.images} images of {size} px{weights}, {self.recipe}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the table and leaves JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    with using_threads(arguments.threads):
        settings = options.settings_of(arguments, "k", "timed_iterations", recipes=RECIPES.values())
    kept = options.result_file(arguments, f"end_to_end_{arguments.model}_k{arguments.k}", settings)
    rows = {}
    for case in _cases(arguments):
        few = arguments.timed_iterations if case.recipe == "practise" else 0
        rows[case.title] = _measured(case, few, kept, arguments)
        print(f"{case.title}: {rows[case.title]['seconds']:.1f} s{_how(rows[case.title])}", flush=True)
        _print(rows)
    kept.put("table", rows)


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    base = Case(
        model=arguments.model,
        k=arguments.k,
        images=arguments.images,
        recipe="fast",
        random=arguments.random,
        device=arguments.device,
        threads=arguments.threads,
        seed=arguments.seed,
        data=arguments.data,
    )
    if not arguments.growth_only:
        yield from (dataclasses.replace(base, recipe=recipe) for recipe in arguments.recipes)
    if "images" in arguments.growth:
        for images in arguments.image_counts:
            yield dataclasses.replace(base, images=images)
    if "blocks" in arguments.growth:
        for model in arguments.block_models:
            yield dataclasses.replace(base, model=model)
    if "resolution" in arguments.growth:
        for size in arguments.sizes:
            yield dataclasses.replace(base, model=arguments.resolution_model, k=2, size=size)


def _measured(case: Case, few: int, kept: ResultFile, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a case, or takes it up; scaled from `few` iterations unless that is 0."""
    cases = [dataclasses.replace(case, iterations=n) for n in (0, few)] if few else [case]
    runs = [
        kept.once(
            f"{one.title}, {'all' if one.iterations is None else one.iterations} iterations",
            partial(run if arguments.in_process else _apart, one),
        )
        for one in cases
    ]
    return scaled(runs[0], runs[1], few, RECIPES[case.recipe]) if few else runs[0]


def _apart(case: Case) -> dict[str, Any]:
    """Runs a case in a new process, whose peak memory is then the case's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(run, case).result()


def run(case: Case) -> dict[str, Any]:
    """Compresses once.

    Returns:
        Seconds in all and by stage, peak memory in bytes, and what was chosen.
    """
    subject = networks.subject_of(
        case.model, case.images, case.seed, random=case.random, data_path=case.data, size=case.size
    )
    before = peak_memory("cpu")
    begun = time.perf_counter()
    small = fxprune.compress(
        subject.model.to(case.device),
        subject.images,
        k=case.k,
        recipe=options.shortened(case.recipe, case.iterations, case.iterations),
        images=case.images,
        device=case.device,
        threads=case.threads,
        seed=case.seed,
        progress=False,
    )
    seconds = time.perf_counter() - begun
    report = fxprune.report(small)
    return {
        "seconds": seconds,
        "durations": dict(report.durations),
        "chosen": list(report.plan.chosen),
        "regions": len(report.plan.scores),
        "latency_ratio": report.latency.ratio,
        "peak_bytes": peak_memory(case.device),
        "process_bytes_before": before,
        "process_bytes": peak_memory("cpu"),
        "trained": subject.trained,
        "threads": report.settings["threads"],
    }


def scaled(
    without: Mapping[str, Any], few: Mapping[str, Any], iterations: int, recipe: Recipe
) -> dict[str, Any]:
    """Scales the stages that iterate from a run of no iterations and one of a few; the rest is the former's."""
    durations = dict(without["durations"])
    for stage, fit in ITERATING.items():
        fixed, timed = without["durations"][stage], few["durations"][stage]
        wanted = getattr(recipe, fit).iterations
        durations[stage] = fixed + max(0.0, timed - fixed) / iterations * wanted
    gained = sum(durations.values()) - sum(without["durations"].values())
    return {
        **few,
        "seconds": without["seconds"] + gained,
        "durations": durations,
        "chosen": [],  # so few iterations choose nothing worth naming
        "scaled_from_iterations": iterations,
    }


def _how(row: Mapping[str, Any]) -> str:
    few = row.get("scaled_from_iterations")
    return f" (scaled from {few} iterations)" if few else ""


def _print(rows: Mapping[str, Mapping[str, Any]]) -> None:
    shown = [{"case": title + _how(row), **row, **row["durations"]} for title, row in rows.items()]
    stages = {f"{stage}, s": stage for stage in STAGES}
    memory = {"peak MiB": ("peak_bytes", 2.0**-20)}
    print_rows(shown, {"case": "case", "regions": "regions", **stages, "all, s": "seconds", **memory})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = {**options.NETWORK, "model": "resnet56", "k": 8, "recipes": ("fast", "practise")}
    parser = options.parser("end_to_end", __doc__, **defaults)
    add, alone = parser.add_argument, "leave out the case of --model itself"
    add("--timed-iterations", type=int, default=20, help="of practise, 0 for all (default: %(default)s)")
    add("--growth", type=options.words, default=(), help=f"of {','.join(GROWTH)}")
    add("--growth-only", action="store_true", help=alone)
    add("--image-counts", type=options.counts, default=IMAGE_COUNTS, help="default: 100,250,500")
    add("--block-models", type=options.words, default=BLOCK_MODELS, help="for --growth blocks")
    add("--sizes", type=options.counts, default=SIZES, help="default: 96,160,224")
    add("--resolution-model", default="mobilenet_v2", choices=sorted(networks.MODELS))
    add("--in-process", action="store_true", help="no process for each case: peaks run together")
    arguments = options.parse(parser, argv)
    for option, given, known in (
        ("--growth", arguments.growth, GROWTH),
        ("--recipes", arguments.recipes, tuple(RECIPES)),
        ("--block-models", arguments.block_models, tuple(networks.MODELS)),
    ):
        unknown = [word for word in given if word not in known]
        if unknown:
            parser.error(f"{option} knows no {', '.join(unknown)}; choose from {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    main()
