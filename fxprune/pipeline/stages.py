"""The stages between opening and closing, each a function on a `Job`; `api.py` strings them together.

Under `torchrun` every process runs all of this. What is noisy (latency) or a decision (the plan) is done on rank 0 and
told to the others, so that all of them build the same network.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.discovery.planned import planned_regions, regions_named
from fxprune.measurements import CountComparison, LatencyComparison
from fxprune.pipeline.clock import latencies_without
from fxprune.pipeline.job import Job
from fxprune.pipeline.targets import check_reach, first_to_meet
from fxprune.processes.group import on_main
from fxprune.recovery.recover import Recovered, cut_and_fold, recover
from fxprune.reports.sweep import SweepPoint
from fxprune.scoring.joint_losses import JointLosses
from fxprune.scoring.scorer import fit_all
from fxprune.selection.planner import Planner, require_enough
from fxprune.selection.plans import BlockScore, DropPlan
from fxprune.timing.counting import count_savings
from fxprune.timing.savings import SCORING, measure_savings

__all__ = ["as_asked", "choose", "repair", "savings", "score", "survey", "worst_fold_error"]


def score(job: Job) -> tuple[BlockScore, ...]:
    """Measures what every region saves, checks that a goal is within reach, then fits what every region costs."""
    regions = job.discovery.regions
    with job.stage(job.options.cost):
        saved = savings(job)
        _check_goal(job, saved)
    with job.stage("scoring"):
        fits = fit_all(job.scorer, [[region] for region in regions], show_progress=job.show_progress)
    job.fits = {region.label: fit for region, fit in zip(regions, fits, strict=True)}
    return tuple(
        BlockScore(region, fit.loss, fit.loss_before, saving)
        for region, fit, saving in zip(regions, fits, saved, strict=True)
    )


def savings(job: Job) -> tuple[LatencyComparison | CountComparison, ...]:
    """What every region saves."""
    regions, cost = job.discovery.regions, job.options.cost
    if cost != "latency":
        image = job.original.images.example(1).to(job.original.device)
        return count_savings(job.original.graph, regions, cost, image)
    return measure_savings(job.original.graph, regions, lambda sets: latencies_without(job, sets, SCORING))


def _check_goal(job: Job, saved: Sequence[LatencyComparison | CountComparison]) -> None:
    """Refuses a goal that even the smallest possible network misses, before the long work starts."""
    if job.options.k is not None:
        require_enough(job.options.k, list(zip(job.discovery.regions, saved, strict=True)))
    elif job.options.has_target:
        check_reach(job)


def _planner(job: Job, scores: Sequence[BlockScore]) -> Planner:
    assert job.options.selection is not None  # filled in when the job was opened
    losses = JointLosses(job.scorer, job.fits, show_progress=job.show_progress)
    return Planner(scores, losses, job.options.selection)


def choose(job: Job, scores: Sequence[BlockScore]) -> DropPlan:
    """The plan: k regions, or the first plan on the path that meets the target, less what it does not need for that.

    Whether a plan meets a target is measured, with all its regions dropped.
    """
    planner, k = _planner(job, scores), job.options.k
    with job.stage("selection"):
        chosen = on_main(lambda: first_to_meet(job, planner) if k is None else planner.of_size(k))
    return DropPlan(tuple(scores), chosen)


def as_asked(job: Job) -> DropPlan:
    """The plan that the caller named: nothing is scored and nothing timed."""
    found, plan = job.discovery, job.options.plan
    if plan is None:
        return DropPlan((), regions_named(job.options.regions, found))
    return DropPlan((), planned_regions(plan, job.original.graph, found))


def repair(job: Job, plan: DropPlan) -> tuple[Recovered, DropPlan]:
    """Cuts the plan's regions, folds adaptors fitted for the whole set, and mimics."""
    recipe, maps = job.options.recipe, {}
    with job.stage("recovery"):
        if recipe.fold_first:
            parts = [job.fits_of(plan.regions)]
            fit = fit_all(job.scorer, [plan.regions], parts, show_progress=job.show_progress)[0]
            maps = dict(fit.maps)
            plan = DropPlan(plan.scores, plan.regions, fit.loss)
        job.scorer.release()  # mimicking is what needs the most memory
        recovered = recover(
            job.original,
            plan.regions,
            maps,
            recipe.mimic,
            held_back=job.held_back,
            cache_bytes=job.options.cache_bytes,
            progress=job.show_progress,
        )
    return recovered, plan


def worst_fold_error(job: Job, plan: DropPlan) -> float | None:
    """The worst fold error of the adaptors that the chosen regions were scored with; None where they were not."""
    scored = [region for region in plan.regions if region.label in job.fits]
    errors = [cut_and_fold(job.original, [r], job.fits[r.label].maps)[1] for r in scored]
    return max((error for error in errors if error is not None), default=None)


def survey(job: Job, scores: Sequence[BlockScore]) -> tuple[SweepPoint, ...]:
    """Every plan on the path, timed, with the loss that fitting its adaptors together leaves."""
    planner = _planner(job, scores)
    with job.stage("selection"):
        plans = on_main(lambda: list(planner.path()))
    with job.stage("measurement"):
        latencies = latencies_without(job, plans)
    with job.stage("losses"):
        parts = [job.fits_of(plan) for plan in plans]
        fits = fit_all(job.scorer, plans, parts, show_progress=job.show_progress)
    with job.stage("evaluation"):
        accuracies = [
            job.judge(cut_and_fold(job.original, plan, fit.maps)[0]).figure if job.judge.has_measure else None
            for plan, fit in zip(plans, fits, strict=True)
        ]
    return tuple(
        SweepPoint(tuple(region.label for region in plan), fit.loss, latency, accuracy)
        for plan, fit, latency, accuracy in zip(plans, fits, latencies, accuracies, strict=True)
    )
