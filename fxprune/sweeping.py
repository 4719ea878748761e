"""Every k at once: the whole front from one scoring."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx, nn

from fxprune.calibration.drawing import draw
from fxprune.discovery.labels import Ignore
from fxprune.errors import OptionError
from fxprune.files import check_writable, write_text_atomic
from fxprune.graph.regions import Kind, Region
from fxprune.options import Backend, CompressOptions, Criterion, Recipe, Selection, recipe_named
from fxprune.pipeline.job import Clock, Job, default_device, input_names, open_job
from fxprune.pipeline.stages import compare_plans, score, settings_of
from fxprune.processes.group import ensure_group, is_main, main_first, on_main
from fxprune.processes.threads import using_threads
from fxprune.recovery.recover import cut_and_fold
from fxprune.reports.plots import front_svg
from fxprune.reports.sweep import SweepPoint, SweepReport
from fxprune.scoring.joint_losses import JointLosses
from fxprune.scoring.stored import stored_latency
from fxprune.selection.planner import Planner
from fxprune.timing.environment import versions
from fxprune.timing.savings import without

__all__ = ["sweep"]


def sweep(
    model: Any,
    loader: Any,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    recipe: str | Recipe = "fast",
    criterion: Criterion = "recovery",
    selection: Selection | None = None,
    backend: Backend = "torch",
    device: str | None = None,
    kinds: Iterable[str | Kind] = (Kind.IDENTITY,),
    ignore: Ignore | Sequence[Ignore] = (),
    tap: str | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    images: int = 500,
    latency_batch: int | None = None,
    cache_bytes: int = 2 * 2**30,
    seed: int = 0,
    threads: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> SweepReport:
    """Measures latency and recovery loss for every number of dropped regions, from one scoring.

    Nothing is mimicked: the losses are those of fitted and folded adaptors. Arguments are those of
    `fxprune.compress`, and besides:

    Args:
        model: The network.
        loader: The calibration images.
        evaluate: Called with each network, adaptors folded; returns its accuracy.
        recipe: How regions are scored.
        criterion: By what.
        selection: `greedy` or `independent`; a path has no `exact`.
        backend: Where latency is measured.
        device: Where to work.
        kinds: Kinds of region.
        ignore: What must stay.
        tap: Where features are compared.
        input_fn: Turns a batch into inputs.
        images: Most calibration images to use.
        latency_batch: Images in a timed batch.
        cache_bytes: Memory for cached activations.
        seed: Of every random draw.
        threads: Of torch and onnxruntime on the CPU.
        out: Folder for `sweep.json`, `sweep.svg` and finished scores.
        progress: Whether to draw progress bars.

    Returns:
        One point for each k from 1 to the most regions that can be dropped.

    Raises:
        FxpruneError: As `fxprune.compress`.
    """
    place = default_device(device, model)
    chosen = recipe_named(recipe)
    if selection == "exact":
        raise OptionError("selection='exact' has no path of growing plans; use 'greedy' or 'independent'")
    options = CompressOptions(
        k=1,
        target_speedup=None,
        target_latency_ms=None,
        min_agreement=None,
        recipe=chosen,
        criterion=criterion,
        selection=selection or chosen.selection,
        backend=backend,
        device=place,
        images=images,
        latency_batch=(64 if place.startswith("cuda") else 8) if latency_batch is None else latency_batch,
        cache_bytes=cache_bytes,
        seed=seed,
    )
    ensure_group()
    folder = None if out is None else main_first(lambda: check_writable(out))
    bars = is_main() and (os.isatty(2) if progress is None else progress)
    clock = Clock()
    with using_threads(threads):
        with clock("trace"):
            calibration = draw(loader, limit=images, seed=seed, input_fn=input_fn, names=input_names(model))
            job = open_job(
                model, calibration, options, kinds=kinds, ignore=ignore, tap=tap, folder=folder, bars=bars
            )
        scores = score(job, clock)
        with clock("selection"):
            planner = Planner(scores, JointLosses(job.scorer, job.fits), options.selection)
            plans = on_main(lambda: list(planner.path()))
        with clock("measurement"):
            networks = [without(job.original, plan) for plan in plans]
            latencies = on_main(
                lambda: stored_latency(job.store, "sweep", lambda: compare_plans(job, networks))
            )
        with clock("losses"):
            points = [
                _point(job, plan, latency, evaluate) for plan, latency in zip(plans, latencies, strict=True)
            ]
    report = SweepReport(
        points=tuple(points),
        scores=scores,
        accuracy=None if evaluate is None else evaluate(job.original),
        settings=settings_of(job),
        durations=clock.seconds,
        versions=versions(place),
    )
    if folder is not None and is_main():
        write_text_atomic(folder / "sweep.json", report.to_json())
        write_text_atomic(folder / "sweep.svg", _plot(report))
    return report


def _point(
    job: Job, plan: Sequence[Region], latency: Any, evaluate: Callable[[fx.GraphModule], float] | None
) -> SweepPoint:
    fit = job.scorer.fit(plan, job.parts(plan))
    accuracy = None
    if evaluate is not None:
        folded, _ = cut_and_fold(
            job.original, plan, fit.maps, job.tap, job.calibration, device=job.options.device
        )
        accuracy = evaluate(folded)
    return SweepPoint(tuple(region.label for region in plan), fit.loss, latency, accuracy)


def _plot(report: SweepReport) -> str:
    points = [(1e3 * p.latency.after.median_s, p.recovery_loss, f"k={len(p.dropped)}") for p in report.points]
    return front_svg(points, x_name="latency, ms", y_name="recovery loss")
