"""The default scorer against the paper's: times, rank correlation, chosen sets, memory, and an ablation.

    python -m benchmarks.scoring --model resnet20 [--reference-iterations 1000] [--timed-iterations 100]
                                 [--regions LABELS] [--reference-from FILES] [--ablation]

The reference is `EndToEndScorer` with the settings of `recipe="practise"`. Its losses come from all its iterations, a
few regions side by side (see `benchmarks.reference`) and kept as they end, so that an interrupted run goes on, or from
an earlier result, which may come from a faster machine. Its time is scaled: a region costs
`t(0) + N (t(n) - t(0)) / n`, where `t(n)` is the time of a fit of n iterations, so that building the candidate and
taking its two losses, which `t(0)` is, are counted once. The default scorer is timed in turns with these fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import subjects
from benchmarks.reference import losses_side_by_side
from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.options import RECIPES, FitSettings
from fxprune.pipeline.job import Job
from fxprune.processes.threads import using_threads
from fxprune.reports.tables import render
from fxprune.scoring.cached import CachedScorer
from fxprune.scoring.end_to_end import EndToEndScorer
from fxprune.scoring.scorer import fit_all
from fxprune.timing.environment import peak_memory

__all__ = ["main", "scaled_seconds", "spearman"]

FAST = RECIPES["fast"].adaptor
SIDE_BY_SIDE = 5
"""Regions whose reference losses are fitted together, and lost together where a run is stopped."""


class _OneAtATime(CachedScorer):
    """The default scorer without fits side by side."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.workers = 1


class _IdentityStart(CachedScorer):
    """The default scorer without its least squares: adaptors begin as the identity."""

    def _solve(self, work: Any, cache: Any) -> None:
        """Leaves the adaptors as they are."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to score.

    Attributes:
        kind: The scorer.
        settings: Of its gradient fit.
        shared: Whether all candidates share one cache of activations.
        extra: Further arguments of the scorer.
    """

    kind: type[CachedScorer] = CachedScorer
    settings: FitSettings = FAST
    shared: bool = True
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, print the tables and leave JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    subject = subjects.subject_of(
        arguments.model,
        arguments.images,
        arguments.seed,
        random=arguments.random,
        data_path=arguments.data,
    )
    settings = subjects.settings_of(arguments) | {"trained": subject.trained}
    notebook = subjects.Notebook(
        arguments.out or f"scoring_{arguments.model}_{arguments.images}", settings, arguments.seed
    )
    with using_threads(arguments.threads):
        job = subjects.job_of(subject, seed=arguments.seed, device=arguments.device)
        regions = _named(job, arguments.regions)
        notebook.put("memory before, bytes", peak_memory(arguments.device))
        seconds = _in_turns(job, regions, notebook, arguments)
        for name, variant in _variants(arguments).items():
            runs = [_run(job, regions, variant) for _ in range(arguments.repeats)]
            _note_runs(name, runs, notebook)
        savings = notebook.once("savings", lambda: subjects.savings_of(job))
        reference = _reference(job, regions, notebook, arguments)
    rows = _compared(notebook, regions, reference, seconds, savings)
    notebook.put("comparison", rows)
    _print(rows, seconds, arguments)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; ties get their mean rank. NaN where one side is constant or has fewer than two values."""
    ranks = [_ranks(np.asarray(values)) for values in (first, second)]
    if len(first) < 2 or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Any) -> Any:
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(ties)
    return ((2 * last - ties - 1) / 2)[place]


def scaled_seconds(fixed: float, timed: float, timed_iterations: int, iterations: int) -> float:
    """Seconds of a fit of `iterations`, from those of none (`fixed`) and of `timed_iterations` (`timed`)."""
    return fixed + max(0.0, timed - fixed) / timed_iterations * iterations


def _named(job: Job, labels: Sequence[str]) -> list[Region]:
    known = {region.label: region for region in job.found.regions}
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise OptionError(f"no region is called {', '.join(unknown)}; the regions are: {', '.join(known)}")
    return [known[label] for label in labels] if labels else list(known.values())


def _variants(arguments: argparse.Namespace) -> dict[str, Variant]:
    rows: dict[str, Variant] = {}
    if not arguments.ablation:
        return rows
    change = dataclasses.replace
    rows["one fit at a time"] = Variant(kind=_OneAtATime)
    rows["no least squares"] = Variant(kind=_IdentityStart)
    rows["no gradient steps"] = Variant(settings=change(FAST, iterations=0))
    rows["no steps at the waist"] = Variant(extra={"at_waist": 0.0})
    rows["no warm-up"] = Variant(settings=change(FAST, warmup=0))
    for count in (40, 60, 120):
        rows[f"{count} iterations"] = Variant(settings=change(FAST, iterations=count))
    for size, count in ((4, 160), (16, 40)):
        few = change(FAST, batch_size=size, iterations=count)
        rows[f"batch {size}, {count} iterations"] = Variant(settings=few)
    for count in (16, 256):
        rows[f"{count} images for least squares"] = Variant(extra={"start_images": count})
    for count in (64, 256, arguments.images):
        rows[f"loss over {count} images"] = Variant(extra={"loss_images": count})
    rows["a cache for each candidate"] = Variant(shared=False)
    return {name: variant for name, variant in rows.items() if variant != Variant()}


def _run(job: Job, regions: Sequence[Region], variant: Variant) -> dict[str, Any]:
    """Score all regions, from nothing."""
    _finish_device(job)
    begun = time.perf_counter()
    scorer = variant.kind(
        job.original,
        job.tap,
        job.calibration,
        variant.settings,
        device=job.options.device,
        seed=job.options.seed,
        cache_bytes=job.options.cache_bytes,
        **variant.extra,
    )
    sets = [[region] for region in regions]
    fits = fit_all(scorer, sets) if variant.shared else [scorer.fit(one) for one in sets]
    _finish_device(job)
    return {
        "seconds": time.perf_counter() - begun,
        "losses": {region.label: fit.loss for region, fit in zip(regions, fits, strict=True)},
        "cache_bytes": scorer.peak_bytes,
        "process_bytes": peak_memory(job.options.device),  # the highest so far, so of all rows up to this one
    }


def _note_runs(name: str, runs: Sequence[Mapping[str, Any]], notebook: subjects.Notebook) -> None:
    seconds = [run["seconds"] for run in runs]
    row = {**runs[-1], "seconds": statistics.median(seconds), "all_seconds": seconds}
    notebook.put(f"scorer/{name}", row)
    print(f"{name}: {row['seconds']:.2f} s", flush=True)


def _finish_device(job: Job) -> None:
    if job.options.device.startswith("cuda"):
        torch.cuda.synchronize()


def _reference(
    job: Job, regions: Sequence[Region], notebook: subjects.Notebook, arguments: argparse.Namespace
) -> dict[str, float]:
    """Losses of the paper's procedure; empty where none were asked for."""
    count = arguments.reference_iterations
    if arguments.reference_from:
        _take_over(arguments.reference_from, count, regions, notebook)
    if not count:
        return {}
    settings = dataclasses.replace(RECIPES["practise"].adaptor, iterations=count)
    missing = [r for r in regions if f"reference/{count}/{r.label}" not in notebook.entries]
    for start in range(0, len(missing), SIDE_BY_SIDE):
        for label, loss in losses_side_by_side(job, missing[start : start + SIDE_BY_SIDE], settings).items():
            notebook.put(f"reference/{count}/{label}", {"loss": loss})
            print(f"reference {label}: loss {loss:.4g}", flush=True)
    return {r.label: notebook.entries[f"reference/{count}/{r.label}"]["loss"] for r in regions}


def _take_over(
    files: Sequence[str], count: int, regions: Sequence[Region], notebook: subjects.Notebook
) -> None:
    """Copy reference losses from earlier results, each of which may hold some of the regions."""
    prefix = f"reference/{count}/"
    taken: dict[str, Any] = {}
    for file in files:
        kept = subjects.kept_result(file)
        if {**kept["settings"], "device": ""} != {**notebook.settings, "device": ""}:
            raise OptionError(
                f"the reference in {file} was made with {kept['settings']}, this run with {notebook.settings}; only "
                "the device may differ"
            )
        taken |= {key: entry for key, entry in kept["entries"].items() if key.startswith(prefix)}
        notebook.put(f"reference taken from/{Path(file).name}", kept["environment"])
    absent = [r.label for r in regions if prefix + r.label not in taken]
    if absent:
        raise OptionError(f"{', '.join(files)} hold no {count} iterations of {', '.join(absent)}")
    for key, entry in taken.items():
        notebook.put(key, entry)


def _timed(job: Job, region: Region, iterations: int) -> dict[str, float]:
    """Fit one region as the paper does."""
    recipe = RECIPES["practise"]
    recipe = dataclasses.replace(recipe, adaptor=dataclasses.replace(recipe.adaptor, iterations=iterations))
    scorer = EndToEndScorer(
        job.original, job.tap, job.calibration, recipe, device=job.options.device, seed=job.options.seed
    )
    _finish_device(job)
    begun = time.perf_counter()
    fit = scorer.fit([region])
    _finish_device(job)
    return {"loss": fit.loss, "loss_before": fit.loss_before, "seconds": time.perf_counter() - begun}


def _in_turns(
    job: Job, regions: Sequence[Region], notebook: subjects.Notebook, arguments: argparse.Namespace
) -> float | None:
    """Time the default scorer and the published fits in turns, so that both see the machine's slow hours.

    Returns:
        The time of 1000 iterations a region, scaled on this machine; None where it was not asked for.
    """
    few, wanted = arguments.timed_iterations, RECIPES["practise"].adaptor.iterations
    threads = torch.get_num_threads()
    runs, total = [], 0.0
    for turn in range(arguments.repeats):
        runs.append(_run(job, regions, Variant()))
        for region in regions[turn :: arguments.repeats] if few else ():
            ends = [
                notebook.once(f"timed/{threads} threads/{n}/{region.label}", partial(_timed, job, region, n))
                for n in (0, few)
            ]
            total += scaled_seconds(ends[0]["seconds"], ends[1]["seconds"], few, wanted)
    _note_runs("default", runs, notebook)
    if not few:
        return None
    text = f"{wanted} iterations a region, scaled from {few}; the two loss evaluations are counted once"
    notebook.put("reference seconds", {"seconds": total, "how": text})
    return total


def _compared(
    notebook: subjects.Notebook,
    regions: Sequence[Region],
    reference: Mapping[str, float],
    seconds: float | None,
    savings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    rows = []
    for key, row in notebook.entries.items():
        if not key.startswith("scorer/") or set(row["losses"]) != {r.label for r in regions}:
            continue
        both = [[source[r.label] for r in regions] for source in (row["losses"], reference) if reference]
        same, of = _same_sets(regions, row["losses"], reference, savings) if reference else (None, None)
        rows.append(
            {
                "scorer": key.removeprefix("scorer/"),
                "seconds": row["seconds"],
                "times as fast": None if seconds is None else seconds / row["seconds"],
                "spearman": spearman(*both) if reference else None,
                "same sets": same,
                "sets": of,
                "cache MiB": row["cache_bytes"] / 2**20,
                "process MiB": None if row["process_bytes"] is None else row["process_bytes"] / 2**20,
                "losses": row["losses"],
                "reference losses": dict(reference),
            }
        )
    return rows


def _same_sets(
    regions: Sequence[Region],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    savings: Mapping[str, Any],
) -> tuple[int, int]:
    """How many of the independent choices for k = 1, 2, ... are the same, with the same savings."""
    paths = [subjects.independent_plans(regions, source, savings) for source in (losses, reference)]
    same = sum(set(a) == set(b) for a, b in zip(*paths, strict=False))
    return same, max(map(len, paths))


def _print(rows: Sequence[Mapping[str, Any]], seconds: float | None, arguments: argparse.Namespace) -> None:
    default = next(row for row in rows if row["scorer"] == "default")
    if default["reference losses"]:
        pairs = [(k, v, default["reference losses"][k]) for k, v in default["losses"].items()]
        print(render(("region", "loss", f"reference, {arguments.reference_iterations} iterations"), pairs))
    headers = (
        "scorer",
        "seconds",
        "times as fast",
        "spearman",
        "same sets",
        "sets",
        "cache MiB",
        "process MiB",
    )
    print(render(headers, [tuple(row[name] for name in headers) for row in rows]))
    if seconds is not None:
        few = arguments.timed_iterations
        print(
            f"reference: {seconds:.1f} s for {RECIPES['practise'].adaptor.iterations} iterations a region, scaled from "
            f"{few}; the two loss evaluations are counted once, not scaled"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring", description=(__doc__ or "").split("\n")[0]
    )
    subjects.add_arguments(parser, model="resnet20")
    parser.add_argument(
        "--reference-iterations",
        type=int,
        default=1000,
        help="of the losses, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--timed-iterations", type=int, default=100, help="of the time, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--regions", type=subjects.words, default=(), help="labels, such as layer1.0,layer1.1"
    )
    parser.add_argument(
        "--reference-from",
        type=subjects.words,
        default=(),
        help="earlier results of this benchmark, for the reference losses",
    )
    parser.add_argument("--ablation", action="store_true", help="a row for each idea switched off")
    parser.add_argument("--repeats", type=int, default=3, help="of each row (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
