"""Wall time and peak memory of the whole of `compress`, stage by stage, and how they grow.

    python -m benchmarks.end_to_end --model resnet56 --k 8 [--timed-iterations 20]
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
from benchmarks import subjects
from fxprune.options import RECIPES, Recipe
from fxprune.reports.tables import render
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
        model: See `benchmarks.subjects.MODELS`.
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
        size = subjects.MODELS[self.model].size if self.size is None else self.size
        weights = ", random" if self.random else ""
        return f"{self.model} k={self.k}, {self.images} images of {size} px{weights}, {self.recipe}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the table and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    settings = {
        **subjects.settings_of(arguments, "k", "threads", "timed_iterations"),
        **subjects.recipes_of(*RECIPES),
    }
    name = arguments.out or f"end_to_end_{arguments.model}_k{arguments.k}"
    notebook = subjects.Notebook(name, settings, arguments.seed)
    rows = {}
    for case in _cases(arguments):
        few = arguments.timed_iterations if case.recipe == "practise" else 0
        rows[case.title] = _measured(case, few, notebook, arguments)
        print(f"{case.title}: {rows[case.title]['seconds']:.1f} s{_how(rows[case.title])}", flush=True)
        _print(rows)
    notebook.put("table", rows)


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


def _measured(
    case: Case, few: int, notebook: subjects.Notebook, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run a case, or take it up; scaled from `few` iterations unless that is 0."""
    cases = [dataclasses.replace(case, iterations=n) for n in (0, few)] if few else [case]
    runs = [
        notebook.once(
            f"{one.title}, {'all' if one.iterations is None else one.iterations} iterations",
            partial(run if arguments.in_process else _apart, one),
        )
        for one in cases
    ]
    return scaled(runs[0], runs[1], few, RECIPES[case.recipe]) if few else runs[0]


def _apart(case: Case) -> dict[str, Any]:
    """Run a case in a new process, whose peak memory is then the case's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(run, case).result()


def run(case: Case) -> dict[str, Any]:
    """Compress once.

    Returns:
        Seconds in all and by stage, peak memory in bytes, and what was chosen.
    """
    subject = subjects.subject_of(
        case.model, case.images, case.seed, random=case.random, data_path=case.data, size=case.size
    )
    before = peak_memory("cpu")
    begun = time.perf_counter()
    small = fxprune.compress(
        subject.model.to(case.device),
        subject.images,
        k=case.k,
        recipe=subjects.shortened(case.recipe, case.iterations),
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
    """Scale the stages that iterate from a run of no iterations and one of a few; the rest is the former's."""
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
    headers = ("case", "regions", *(f"{stage}, s" for stage in STAGES), "all, s", "peak MiB")
    cells = [
        (
            title + _how(row),
            row["regions"],
            *(row["durations"].get(stage) for stage in STAGES),
            row["seconds"],
            None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20,
        )
        for title, row in rows.items()
    ]
    print(render(headers, cells), flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=(__doc__ or "").split("\n")[0]
    )
    subjects.add_arguments(parser, model="resnet56")
    parser.add_argument("--k", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--recipes", type=subjects.words, default=("fast", "practise"), help="default: fast,practise"
    )
    parser.add_argument(
        "--timed-iterations",
        type=int,
        default=20,
        help="of practise, 0 to run it in full (default: %(default)s)",
    )
    parser.add_argument("--growth", type=subjects.words, default=(), help=f"of {','.join(GROWTH)}")
    parser.add_argument("--growth-only", action="store_true", help="leave out the case of --model itself")
    parser.add_argument(
        "--image-counts", type=subjects.counts, default=IMAGE_COUNTS, help="default: 100,250,500"
    )
    parser.add_argument(
        "--block-models", type=subjects.words, default=BLOCK_MODELS, help="for --growth blocks"
    )
    parser.add_argument("--sizes", type=subjects.counts, default=SIZES, help="default: 96,160,224")
    parser.add_argument("--resolution-model", default="mobilenet_v2", choices=sorted(subjects.MODELS))
    parser.add_argument(
        "--in-process", action="store_true", help="no process of its own for each case: peaks run together"
    )
    arguments = parser.parse_args(argv)
    for option, given, known in (
        ("--growth", arguments.growth, GROWTH),
        ("--recipes", arguments.recipes, tuple(RECIPES)),
        ("--block-models", arguments.block_models, tuple(subjects.MODELS)),
    ):
        unknown = [word for word in given if word not in known]
        if unknown:
            parser.error(f"{option} knows no {', '.join(unknown)}; choose from {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    main()
