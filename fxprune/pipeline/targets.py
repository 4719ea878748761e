"""Meeting a latency target with no more cuts than it takes."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.errors import TargetError
from fxprune.graph.regions import Region
from fxprune.measurements import LatencyComparison
from fxprune.options import Options
from fxprune.pipeline.clock import latencies_without
from fxprune.pipeline.job import Job
from fxprune.selection.planner import Planner
from fxprune.selection.plans import largest_plan

__all__ = ["check_reach", "first_to_meet"]

TARGET_SLACK = 0.05
"""A plan is timed as a whole once its regions' savings add up to the target, less this much."""


def check_reach(job: Job) -> None:
    """Refuses a target that the original meets already, and one that not even the smallest network meets.

    Raises:
        TargetError: With the latencies that were measured.
    """
    everything = largest_plan(job.discovery.regions)
    measured = latencies_without(job, [everything])[0]
    before, after = 1e3 * measured.before.median_s, 1e3 * measured.after.median_s
    where = f"({job.options.backend}, batch {job.latency_batch})"
    if job.options.target_latency_ms is not None and before <= job.options.target_latency_ms:
        raise TargetError(
            f"the network takes {before:.3f} ms already, less than target_latency_ms, "
            f"{job.options.target_latency_ms} {where}: there is nothing to cut"
        )
    if not _meets(job.options, measured):
        raise TargetError(
            f"{_target(job.options)} is out of reach: without all {len(everything)} regions the network takes "
            f"{after:.3f} ms instead of {before:.3f} ms, {1 / measured.ratio:.2f} times as fast {where}"
        )


def first_to_meet(job: Job, planner: Planner) -> tuple[Region, ...]:
    """The first plan on the path that meets the target, less what it does not need for that.

    Raises:
        TargetError: None does.
    """
    options = job.options
    missed: tuple[Region, ...] = ()
    for plan in planner.path():
        if _may_meet(options, planner, plan):
            measured = latencies_without(job, [plan])[0]
            if _meets(options, measured):
                return _trimmed(job, planner, plan, missed)
        missed = plan
    if not missed:
        best = "no region saves time beyond the noise; regions= cuts what is named all the same"
    else:
        furthest = latencies_without(job, [missed])[0]
        best = f"the furthest plan, {len(missed)} regions, is {1 / furthest.ratio:.2f} times as fast"
    raise TargetError(f"{_target(options)} is out of reach: {best} ({options.backend})")


def _meets(options: Options, measured: LatencyComparison) -> bool:
    if options.target_speedup is not None:
        return measured.ratio * options.target_speedup <= 1.0
    assert options.target_latency_ms is not None
    return 1e3 * measured.before.median_s * measured.ratio <= options.target_latency_ms


def _target(options: Options) -> str:
    if options.target_speedup is not None:
        return f"a speed-up of {options.target_speedup}"
    return f"{options.target_latency_ms} ms"


def _may_meet(options: Options, planner: Planner, plan: Sequence[Region]) -> bool:
    """Whether the savings of a plan's regions add up to the target, less some slack, so that timing it is worth it."""
    if options.target_speedup is not None:
        wanted = 1.0 / options.target_speedup
    else:
        timed = planner.scores[0].latency
        assert options.target_latency_ms is not None and timed is not None  # a target is one of latency
        wanted = options.target_latency_ms / (1e3 * timed.before.median_s)
    return 1.0 - planner.saving(plan) <= wanted + TARGET_SLACK


def _trimmed(
    job: Job, planner: Planner, plan: tuple[Region, ...], missed: tuple[Region, ...]
) -> tuple[Region, ...]:
    """A plan that meets the target, less what it does not need: regions that a later, larger saving made needless.

    The region with the largest recovery loss is spared first. `missed` is known to fall short.
    """
    losses = {score.region.label: score.recovery_loss for score in planner.scores}
    for region in sorted(plan, key=lambda region: losses[region.label], reverse=True):
        fewer = tuple(other for other in plan if other is not region)
        if not fewer or fewer == missed or not _may_meet(job.options, planner, fewer):
            continue
        if _meets(job.options, latencies_without(job, [fewer])[0]):
            plan = fewer
    return plan
