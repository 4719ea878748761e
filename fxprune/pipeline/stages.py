"""The stages of the pipeline, each a function on a `Job`; `api.py` strings them together.

Under `torchrun` every process runs all of this. What is noisy (latency) or a decision (the plan) is done on rank 0 and
told to the others, so that all of them build the same network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import CalibrationSet
from fxprune.errors import OptionError
from fxprune.graph.call import flat_tensors, positional
from fxprune.graph.regions import Region
from fxprune.measurements import LatencyComparison
from fxprune.options import CompressOptions
from fxprune.pipeline.job import Clock, Job
from fxprune.processes.group import on_main
from fxprune.recovery.recover import Recovered, cut_and_fold, recover
from fxprune.scoring.joint_losses import JointLosses
from fxprune.scoring.scorer import fit_all
from fxprune.scoring.stored import stored_latency
from fxprune.selection.planner import Planner, require_enough
from fxprune.selection.plans import BlockScore, DropPlan, largest_plan
from fxprune.timing import latency as timing
from fxprune.timing.savings import measure_savings, without

__all__ = [
    "agreement",
    "choose",
    "compare_plans",
    "repair",
    "score",
    "settings_of",
    "worst_fold_error",
]

_SLACK = 0.05
"""A plan is timed as a whole once its regions' savings add up to the target, less this much."""


def score(job: Job, clock: Clock) -> tuple[BlockScore, ...]:
    """Measures what every region saves, checks that a target is within reach, then fits what every region costs."""
    regions = job.found.regions
    with clock("latency"):
        savings = on_main(lambda: stored_latency(job.store, "savings", lambda: _savings(job)))
        _check_reach(job, savings)
    with clock("scoring"):
        fits = fit_all(job.scorer, [[region] for region in regions])
    job.fits = {region.label: fit for region, fit in zip(regions, fits, strict=True)}
    return tuple(
        BlockScore(region, fit.loss, fit.loss_before, saving)
        for region, fit, saving in zip(regions, fits, savings, strict=True)
    )


def _timed_batch(job: Job) -> Any:
    index = torch.arange(job.options.latency_batch) % job.calibration.size
    return job.calibration.inputs.select(index)


def _savings(job: Job) -> tuple[LatencyComparison, ...]:
    batch = _timed_batch(job)
    return measure_savings(
        job.original,
        job.found.regions,
        flat_tensors(batch),
        lambda network: positional(network, batch),
        backend=job.options.backend,
        device=job.options.device,
    )


def compare_plans(
    job: Job, networks: Sequence[fx.GraphModule], settings: timing.TimingSettings | None = None
) -> tuple[LatencyComparison, ...]:
    """Times networks against the original, all in turns."""
    batch = _timed_batch(job)
    return timing.compare(
        positional(job.original, batch),
        [positional(network, batch) for network in networks],
        flat_tensors(batch),
        backend=job.options.backend,
        device=job.options.device if job.options.backend == "torch" else None,
        settings=settings,
    )


def _meets(options: CompressOptions, measured: LatencyComparison) -> bool:
    if options.target_speedup is not None:
        return measured.ratio * options.target_speedup <= 1.0
    assert options.target_latency_ms is not None
    return 1e3 * measured.before.median_s * measured.ratio <= options.target_latency_ms


def _target(options: CompressOptions) -> str:
    if options.target_speedup is not None:
        return f"a speed-up of {options.target_speedup}"
    return f"{options.target_latency_ms} ms"


def _check_reach(job: Job, savings: Sequence[LatencyComparison]) -> None:
    """Refuses a goal that even the smallest possible network misses, before the long work starts."""
    if job.options.k is not None:
        require_enough(job.options.k, list(zip(job.found.regions, savings, strict=True)))
        return
    everything = largest_plan(job.found.regions)
    measured = on_main(lambda: _timed(job, everything))
    if not _meets(job.options, measured):
        raise OptionError(
            f"{_target(job.options)} is out of reach: without all {len(everything)} regions the network takes "
            f"{1e3 * measured.after.median_s:.3f} ms instead of {1e3 * measured.before.median_s:.3f} ms, "
            f"{1 / measured.ratio:.2f} times as fast ({job.options.backend}, batch {job.options.latency_batch})"
        )


def choose(job: Job, scores: Sequence[BlockScore]) -> DropPlan:
    """The plan: k regions, or the first plan on the path that meets the target, less what it does not need for that.

    Whether a plan meets a target is measured, with all its regions dropped.
    """
    planner = Planner(scores, JointLosses(job.scorer, job.fits), job.options.selection)
    chosen = on_main(
        lambda: planner.of_size(job.options.k) if job.options.k is not None else _first_to_meet(job, planner)
    )
    return DropPlan(tuple(scores), chosen)


def _first_to_meet(job: Job, planner: Planner) -> tuple[Region, ...]:
    options = job.options
    measured: LatencyComparison | None = None
    missed: tuple[Region, ...] = ()
    for plan in planner.path():
        if _promising(options, planner, plan):
            measured = _timed(job, plan)
            if _meets(options, measured):
                return _spared(job, planner, plan, missed)
        missed = plan
    best = (
        "no region saves time beyond the noise"
        if measured is None
        else f"{1 / measured.ratio:.2f} times as fast"
    )
    raise OptionError(f"{_target(options)} is out of reach: the furthest plan is {best} ({options.backend})")


def _promising(options: CompressOptions, planner: Planner, plan: Sequence[Region]) -> bool:
    """Whether the savings of a plan's regions add up to the target, less some slack, so that timing it is worth it."""
    if options.target_speedup is not None:
        wanted = 1.0 / options.target_speedup
    else:
        assert options.target_latency_ms is not None
        wanted = options.target_latency_ms / (1e3 * planner.scores[0].latency.before.median_s)
    return 1.0 - planner.saving(plan) <= wanted + _SLACK


def _spared(
    job: Job, planner: Planner, plan: tuple[Region, ...], missed: tuple[Region, ...]
) -> tuple[Region, ...]:
    """A plan that meets the target, less what it does not need: regions that a later, larger saving made needless.

    The region with the largest recovery loss is spared first. `missed` is known to fall short.
    """
    losses = {score.region.label: score.recovery_loss for score in planner.scores}
    for region in sorted(plan, key=lambda region: losses[region.label], reverse=True):
        fewer = tuple(other for other in plan if other is not region)
        if not fewer or fewer == missed or not _promising(job.options, planner, fewer):
            continue
        if _meets(job.options, _timed(job, fewer)):
            plan = fewer
    return plan


def _timed(job: Job, plan: Sequence[Region]) -> LatencyComparison:
    """The network without a plan's regions, timed once for all runs that share a folder."""
    name = hashlib.sha256("\n".join(region.label for region in plan).encode()).hexdigest()
    return stored_latency(
        job.store, f"plan-{name[:16]}", lambda: compare_plans(job, [without(job.original, plan)])
    )[0]


def repair(job: Job, plan: DropPlan) -> tuple[Recovered, DropPlan]:
    """Cuts the plan's regions, folds adaptors fitted for the whole set, and mimics."""
    maps = {}
    if job.options.recipe.fold_first:
        fit = fit_all(job.scorer, [plan.regions], [job.parts(plan.regions)])[0]
        maps = dict(fit.maps)
        plan = DropPlan(plan.scores, plan.regions, fit.loss)
    job.scorer.release()  # mimicking is what needs the most memory
    recovered = recover(
        job.original,
        plan.regions,
        maps,
        job.tap,
        job.calibration,
        job.options.recipe,
        device=job.options.device,
        seed=job.options.seed,
        progress=job.bars,
    )
    return recovered, plan


def worst_fold_error(job: Job, plan: DropPlan) -> float | None:
    """The worst fold error of the adaptors that the chosen regions were scored with."""
    errors = [
        cut_and_fold(
            job.original,
            [region],
            job.fits[region.label].maps,
            job.tap,
            job.calibration,
            device=job.options.device,
        )[1]
        for region in plan.regions
    ]
    return max((error for error in errors if error is not None), default=None)


@torch.no_grad()
def agreement(job: Job, small: fx.GraphModule, images: CalibrationSet) -> float | None:
    """Share of images on which the largest class score is the same; None where outputs are not class scores."""
    same = 0
    for batch in images.batches(64):
        inputs = batch.to(job.options.device)
        answers = [g(*inputs.args, **inputs.kwargs) for g in (job.original, small)]
        scores = [next((x for x in pytree.tree_leaves(a) if isinstance(x, Tensor)), None) for a in answers]
        if any(s is None or s.dim() != 2 or s.shape[1] < 2 for s in scores):
            return None
        first, second = (s.argmax(1) for s in scores if s is not None)
        same += int((first == second).sum())
    return same / images.size


def settings_of(job: Job) -> dict[str, Any]:
    """What was asked for and found, as plain data."""
    return {**asdict(job.options), "tap": list(job.tap), "threads": torch.get_num_threads()}
