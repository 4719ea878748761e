"""What a job's networks take, timed against its original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.backends import Backend, runs_modules
from fxprune.graph.call import Inputs, flat_tensors, positional
from fxprune.graph.regions import Region
from fxprune.measurements import LatencyComparison
from fxprune.pipeline.job import Job
from fxprune.processes.group import on_main
from fxprune.scoring.stored import stored_latencies
from fxprune.submodules.parts import as_returned
from fxprune.timing import latency as timing
from fxprune.timing.savings import without

__all__ = ["compare_files", "compare_networks", "compare_parts", "latencies_without"]


def compare_networks(
    job: Job, networks: Sequence[fx.GraphModule], settings: timing.TimingSettings | None = None
) -> tuple[LatencyComparison, ...]:
    """Times networks against the original, all in turns; parts of a model each in their place, where that can be."""
    whole, graphs = job.whole, [job.original.graph, *networks]
    if whole is None:
        return _compare(job, [as_returned(graph) for graph in graphs], _batch(job), settings)
    measured = _compare(job, [whole.around(graph) for graph in graphs], whole.batch, settings)
    return tuple(_of_batch(one, whole.batch_shape) for one in measured)


def compare_parts(job: Job, part: fx.GraphModule) -> LatencyComparison | None:
    """Times a part by itself, several joined, against the original one; None where `compare_networks` does."""
    if job.whole is None:
        return None
    return _compare(job, [as_returned(graph) for graph in (job.original.graph, part)], _batch(job))[0]


def _compare(
    job: Job, networks: Sequence[nn.Module], batch: Inputs, settings: timing.TimingSettings | None = None
) -> tuple[LatencyComparison, ...]:
    backend = job.options.backend
    before, *after = (positional(network, batch) for network in networks)
    return timing.compare(
        before,
        after,
        flat_tensors(batch),
        backend=backend,
        device=job.original.device if runs_modules(backend) else None,
        settings=settings,
        show_progress=job.show_progress,
    )


def _of_batch(measured: LatencyComparison, shape: tuple[int, ...]) -> LatencyComparison:
    """What was measured on a list of images, as of one batch."""
    before, after = (replace(one, batch_shape=shape) for one in (measured.before, measured.after))
    return replace(measured, before=before, after=after)


def compare_files(job: Job, name: str, backend: Backend) -> LatencyComparison | None:
    """Times a file of the job's folder against `model.onnx`; None on another device than the CPU and the job's."""
    if job.folder is None or backend not in ("onnxruntime-cpu", job.options.backend):
        return None
    files, inputs = (job.folder / "model.onnx", [job.folder / name]), flat_tensors(_batch(job))
    with job.stage("measurement"):
        return timing.compare(*files, inputs, backend=backend, show_progress=job.show_progress)[0]


def _batch(job: Job) -> Inputs:
    images = job.original.images
    return images.inputs.select(torch.arange(job.latency_batch) % images.size)


def latencies_without(
    job: Job, sets: Sequence[Sequence[Region]], settings: timing.TimingSettings | None = None
) -> tuple[LatencyComparison, ...]:
    """The network without each of some sets of regions, timed once for all runs that share a folder."""
    settings = settings or timing.TimingSettings()

    def measure(missing: Sequence[Sequence[Region]]) -> tuple[LatencyComparison, ...]:
        return compare_networks(job, [without(job.original.graph, one) for one in missing], settings)

    return on_main(lambda: stored_latencies(job.store, sets, _conditions(job, settings), measure))


def _conditions(job: Job, settings: timing.TimingSettings) -> dict[str, Any]:
    backend = job.options.backend
    place = timing.device_of(backend, job.original.device if runs_modules(backend) else None)
    return {
        "backend": backend,
        "machine": timing.device_name(place),
        "batch": job.latency_batch,
        "timing": asdict(settings),
        "whole": None if job.whole is None else job.whole.identity,
    }
