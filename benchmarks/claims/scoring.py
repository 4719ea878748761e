"""The default scorer against the paper's: times, rank correlation, chosen sets, memory, and an ablation.

    python -m benchmarks.claims.scoring --model resnet20 [--reference-iterations 1000] [--timed-iterations 100]
                                        [--regions LABELS] [--reference-from FILES] [--ablation]

The reference is `EndToEndScorer` with the settings of `recipe="practise"`. Its losses come from all its iterations, a
few regions side by side (`benchmarks.judges.published_losses`) and kept as they end, so that an interrupted run goes
on, or from an earlier result, which may come from a faster machine. Its time is scaled: a region costs
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

import torch
from scipy.stats import spearmanr

from benchmarks.common import jobs, options
from benchmarks.common.networks import MODELS
from benchmarks.common.result_file import ResultFile, read_result
from benchmarks.common.tables import print_rows
from benchmarks.judges.published_losses import losses_side_by_side
from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.memory import memory_kept
from fxprune.options import RECIPES, FitSettings
from fxprune.pipeline.job import Job
from fxprune.processes.threads import using_threads
from fxprune.scoring.cached import CachedScorer
from fxprune.scoring.end_to_end import EndToEndScorer
from fxprune.scoring.scorer import fit_all
from fxprune.timing.environment import peak_memory

__all__ = ["main", "scaled_seconds", "spearman"]

FAST = RECIPES["fast"].adaptor
ANYWHERE = {"device": None, "threads": None}
SIDE_BY_SIDE = 5
"""Regions whose reference losses are fitted together, and lost together where a run is stopped."""


class _OneAtATime(CachedScorer):
    """The default scorer without fits side by side."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.workers = 1


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
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for, prints the tables and leaves JSON in `benchmarks/results/`."""
    arguments = _parse(argv)
    trained = MODELS[arguments.model].weights is not None and not arguments.random
    with using_threads(arguments.threads), memory_kept():
        settings = options.settings_of(arguments) | {"trained": trained}
        kept = options.result_file(arguments, f"scoring_{arguments.model}_{arguments.images}", settings)
        job = jobs.job_for(arguments, arguments.seed)
        regions = jobs.regions_named(job, arguments.regions)
        if arguments.reference_from:
            _take_over(arguments, regions, kept)
        kept.put("memory before, bytes", peak_memory(arguments.device))
        seconds = _in_turns(job, regions, kept, arguments)
        for name, variant in (_variants(arguments.images) if arguments.ablation else {}).items():
            runs = [_run(job, regions, variant) for _ in range(arguments.repeats)]
            _note_runs(name, runs, kept)
        savings = kept.once("savings", lambda: jobs.savings_of(job))
        reference = _reference(job, regions, kept, arguments)
    rows = kept.put("comparison", _compared(kept.entries, regions, reference, seconds, savings))
    _print(rows, seconds, arguments)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; ties get their mean rank. NaN where one side is constant or has fewer than two values."""
    if min(len(set(first)), len(set(second))) < 2:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def scaled_seconds(fixed: float, timed: float, timed_iterations: int, iterations: int) -> float:
    """Seconds of a fit of `iterations`, from those of none (`fixed`) and of `timed_iterations` (`timed`)."""
    return fixed + max(0.0, timed - fixed) / timed_iterations * iterations


def _variants(images: int) -> dict[str, Variant]:
    """The rows of the ablation."""
    rows: dict[str, Variant] = {}
    change = dataclasses.replace
    rows["one fit at a time"] = Variant(kind=_OneAtATime)
    rows["no least squares"] = Variant(extra={"start_images": 0})
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
    for count in (64, 256, images):
        rows[f"loss over {count} images"] = Variant(extra={"loss_images": count})
    rows["a cache for each candidate"] = Variant(shared=False)
    return {name: variant for name, variant in rows.items() if variant != Variant()}


def _run(job: Job, regions: Sequence[Region], variant: Variant) -> dict[str, Any]:
    """Scores all regions, from nothing."""
    _finish_device(job)
    begun = time.perf_counter()
    scorer = variant.kind(
        job.original, variant.settings, cache_bytes=job.options.cache_bytes, **variant.extra
    )
    sets = [[region] for region in regions]
    fits = fit_all(scorer, sets) if variant.shared else [scorer.fit(one) for one in sets]
    _finish_device(job)
    return {
        "seconds": time.perf_counter() - begun,
        "losses": {region.label: fit.loss for region, fit in zip(regions, fits, strict=True)},
        "cache_bytes": scorer.peak_bytes,
        "process_bytes": peak_memory(
            job.original.device
        ),  # the highest so far, so of all rows up to this one
    }


def _note_runs(name: str, runs: Sequence[Mapping[str, Any]], kept: ResultFile) -> None:
    seconds = [run["seconds"] for run in runs]
    row = {**runs[-1], "seconds": statistics.median(seconds), "all_seconds": seconds}
    kept.put(f"scorer/{name}", row)
    print(f"{name}: {row['seconds']:.2f} s", flush=True)


def _finish_device(job: Job) -> None:
    if job.original.device.startswith("cuda"):
        torch.cuda.synchronize()


def _reference(
    job: Job, regions: Sequence[Region], kept: ResultFile, arguments: argparse.Namespace
) -> dict[str, float]:
    """Losses of the paper's procedure; empty where none were asked for."""
    count = arguments.reference_iterations
    if not count:
        return {}
    settings = dataclasses.replace(RECIPES["practise"].adaptor, iterations=count)
    missing = [r for r in regions if f"reference/{count}/{r.label}" not in kept.entries]
    for start in range(0, len(missing), SIDE_BY_SIDE):
        for label, loss in losses_side_by_side(job, missing[start : start + SIDE_BY_SIDE], settings).items():
            kept.put(f"reference/{count}/{label}", {"loss": loss})
            print(f"reference {label}: loss {loss:.4g}", flush=True)
    return {r.label: kept.entries[f"reference/{count}/{r.label}"]["loss"] for r in regions}


def _take_over(arguments: argparse.Namespace, regions: Sequence[Region], kept: ResultFile) -> None:
    """Copies reference losses from earlier results, each of which may hold some of the regions.

    All are read before anything is written: the file that is written may be one of them.

    Raises:
        OptionError: A result was made with other settings, or a region is in none.
    """
    prefix = f"reference/{arguments.reference_iterations}/"
    taken: dict[str, Any] = {}
    for file in arguments.reference_from:
        found = read_result(file)
        if found["settings"] | ANYWHERE != kept.settings | ANYWHERE:
            raise OptionError(
                f"the reference in {file} was made with {found['settings']}, this run with {kept.settings}; only "
                "the device may differ"
            )
        taken[f"reference taken from/{Path(file).name}"] = found["environment"]
        taken |= {key: entry for key, entry in found["entries"].items() if key.startswith(prefix)}
    if absent := [region.label for region in regions if prefix + region.label not in taken]:
        raise OptionError(
            f"{', '.join(arguments.reference_from)} hold no {arguments.reference_iterations} iterations of "
            f"{', '.join(absent)}"
        )
    for key, entry in taken.items():
        kept.put(key, entry)


def _timed(job: Job, region: Region, iterations: int) -> dict[str, float]:
    """Fits one region as the paper does."""
    settings = dataclasses.replace(RECIPES["practise"].adaptor, iterations=iterations)
    scorer = EndToEndScorer(job.original, settings)
    _finish_device(job)
    begun = time.perf_counter()
    fit = scorer.fit([region])
    _finish_device(job)
    return {"loss": fit.loss, "loss_before": fit.loss_before, "seconds": time.perf_counter() - begun}


def _in_turns(
    job: Job, regions: Sequence[Region], kept: ResultFile, arguments: argparse.Namespace
) -> float | None:
    """Times the default scorer and the published fits in turns, so that both see the machine's slow hours.

    Returns:
        The time of 1000 iterations a region, scaled on this machine; None where it was not asked for.
    """
    few, wanted = arguments.timed_iterations, RECIPES["practise"].adaptor.iterations
    runs, total = [], 0.0
    for turn in range(arguments.repeats):
        runs.append(_run(job, regions, Variant()))
        for region in regions[turn :: arguments.repeats] if few else ():
            ends = [kept.once(f"timed/{n}/{region.label}", partial(_timed, job, region, n)) for n in (0, few)]
            total += scaled_seconds(ends[0]["seconds"], ends[1]["seconds"], few, wanted)
    _note_runs("default", runs, kept)
    if not few:
        return None
    text = f"{wanted} iterations a region, scaled from {few}; the two loss evaluations are counted once"
    kept.put("reference seconds", {"seconds": total, "how": text})
    return total


def _compared(
    entries: Mapping[str, Any],
    regions: Sequence[Region],
    reference: Mapping[str, float],
    seconds: float | None,
    savings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    rows = []
    for key, row in entries.items():
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
    paths = [jobs.independent_plans(regions, source, savings) for source in (losses, reference)]
    same = sum(set(a) == set(b) for a, b in zip(*paths, strict=False))
    return same, max(map(len, paths))


def _print(rows: Sequence[Mapping[str, Any]], seconds: float | None, arguments: argparse.Namespace) -> None:
    default = next(row for row in rows if row["scorer"] == "default")
    reference, count = default["reference losses"], arguments.reference_iterations
    pairs = [{"region": k, "loss": v, "reference": reference.get(k)} for k, v in default["losses"].items()]
    print_rows(pairs, {"region": "region", "loss": "loss", f"reference, {count} iterations": "reference"})
    columns = (
        "scorer",
        "seconds",
        "times as fast",
        "spearman",
        "same sets",
        "sets",
        "cache MiB",
        "process MiB",
    )
    print_rows(rows, {name: name for name in columns})
    if seconds is not None:
        print(
            f"reference: {seconds:.1f} s for {RECIPES['practise'].adaptor.iterations} iterations a region, scaled from "
            f"{arguments.timed_iterations}; the two loss evaluations are counted once, not scaled"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = {**options.NETWORK, "model": "resnet20", "regions": (), "repeats": 3}
    parser = options.parser("scoring", __doc__, **defaults)
    add = parser.add_argument
    add(
        "--reference-iterations",
        type=int,
        default=1000,
        help="of the losses, 0 for none (default: %(default)s)",
    )
    add("--timed-iterations", type=int, default=100, help="of the time, 0 for none (default: %(default)s)")
    add(
        "--reference-from",
        type=options.words,
        default=(),
        help="results of this script, for the reference losses",
    )
    add("--ablation", action="store_true", help="a row for each idea switched off")
    return options.parse(parser, argv)


if __name__ == "__main__":
    main()
