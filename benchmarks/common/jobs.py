"""One compression opened for measuring its stages one by one, as `fxprune.compress` opens it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common import data
from benchmarks.common.networks import Subject, subject_of
from fxprune.discovery import planned
from fxprune.graph.regions import Region
from fxprune.measurements import LatencyComparison
from fxprune.options import Backend, Options, Recipe, Selection
from fxprune.pipeline.job import Job
from fxprune.pipeline.opening import make_job
from fxprune.pipeline.stages import repair, savings
from fxprune.records import restored
from fxprune.selection.planner import Planner
from fxprune.selection.plans import BlockScore, DropPlan

__all__ = [
    "block_scores",
    "independent_plans",
    "job_for",
    "job_of",
    "reach",
    "regions_named",
    "savings_of",
    "subject_for",
]


def subject_for(arguments: argparse.Namespace, seed: int) -> Subject:
    """The network that a command line names, and the images that it draws with a seed."""
    return subject_of(
        arguments.model, arguments.images, seed, random=arguments.random, data_path=arguments.data
    )


def job_for(arguments: argparse.Namespace, seed: int, recipe: str | Recipe = "fast") -> Job:
    """Opens a compression of that network and those images."""
    return job_of(subject_for(arguments, seed), recipe=recipe, seed=seed, device=arguments.device)


def job_of(
    subject: Subject,
    *,
    recipe: str | Recipe = "fast",
    seed: int,
    device: str = "cpu",
    k: int = 1,
    selection: Selection | None = None,
    backend: Backend = "torch",
) -> Job:
    """Opens a compression as `fxprune.compress` does, up to where scoring begins."""
    options = Options.of(
        k,
        recipe=recipe,
        selection=selection,
        backend=backend,
        images=len(subject.images),
        seed=seed,
        progress=False,
    )
    return make_job(subject.model, subject.images, options.filled(device, torch.get_num_threads()))


def regions_named(job: Job, labels: Sequence[str]) -> list[Region]:
    """The regions of these labels, all where none is given.

    Raises:
        OptionError: A region is not there.
    """
    found = job.discovery
    return list(planned.regions_named(labels, found) if labels else found.regions)


def savings_of(job: Job) -> dict[str, Any]:
    """Measures what each region saves, as plain data by label."""
    regions = job.discovery.regions
    return {region.label: asdict(one) for region, one in zip(regions, savings(job), strict=True)}


def reach(job: Job, regions: Sequence[Region], test: data.LabelledImages | None) -> dict[str, Any]:
    """Recovers the network without a set, and measures it; `test` serves for the accuracy alone."""
    begun = time.perf_counter()
    recovered, plan = repair(job, DropPlan((), tuple(regions)))
    seconds = time.perf_counter() - begun
    small = recovered.graph.to("cpu")
    return {
        "joint_loss": plan.recovery_loss,  # None where nothing was folded first
        "loss_before": recovered.loss_before,
        "loss_after": recovered.loss_after,
        "accuracy": None if test is None else data.accuracy(small, test.images, test.labels),
        "recovery_seconds": seconds,
    }


def block_scores(
    regions: Sequence[Region], losses: Mapping[str, float], savings: Mapping[str, Any]
) -> tuple[BlockScore, ...]:
    """Joins losses and kept savings, both by label, to scores in the regions' order."""
    kept = [(region, losses[region.label], savings[region.label]) for region in regions]
    return tuple(
        BlockScore(region, loss, float("nan"), restored(LatencyComparison, saving))
        for region, loss, saving in kept
    )


def independent_plans(
    regions: Sequence[Region], losses: Mapping[str, float], savings: Mapping[str, Any]
) -> list[tuple[Region, ...]]:
    """Returns the independent choices for k = 1, 2, ... by losses and kept savings, both by label."""
    scores = block_scores(regions, losses, savings)
    return list(Planner(scores, lambda sets, plan: [], "independent").path())
