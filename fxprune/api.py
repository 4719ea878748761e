"""The pipeline: `compress` reads top to bottom as the drawing in docs/architecture.md does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.drawing import draw
from fxprune.discovery.labels import Ignore
from fxprune.discovery.taps import output_tap
from fxprune.errors import GraphError, OptionError
from fxprune.export.onnx_file import ExportRecord
from fxprune.export.onnx_file import export_onnx as _export
from fxprune.files import check_writable, write_text_atomic
from fxprune.graph.call import Inputs
from fxprune.graph.regions import Kind
from fxprune.measurements import LatencyComparison
from fxprune.options import Backend, CompressOptions, Criterion, Recipe, Selection, recipe_named
from fxprune.pipeline.capture import capture_inputs
from fxprune.pipeline.job import Clock, Job, default_device, input_names, open_job
from fxprune.pipeline.replacement import replace_submodule
from fxprune.pipeline.stages import (
    agreement,
    choose,
    compare_plans,
    repair,
    score,
    settings_of,
    worst_fold_error,
)
from fxprune.processes.group import ensure_group, is_main, main_first, on_main
from fxprune.processes.threads import using_threads
from fxprune.recovery.recover import Recovered
from fxprune.reports.compression import CompressionReport
from fxprune.selection.plans import DropPlan
from fxprune.timing import latency as timing
from fxprune.timing.environment import peak_memory, versions

__all__ = ["compress", "export_onnx", "measure", "report"]

_REPORT = "fxprune_report"
_EXAMPLE = "fxprune_example"


def compress(
    model: nn.Module | torch.export.ExportedProgram,
    loader: Any,
    k: int | None = None,
    *,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    min_agreement: float | None = None,
    recipe: str | Recipe = "fast",
    criterion: Criterion = "recovery",
    selection: Selection | None = None,
    backend: Backend = "torch",
    device: str | None = None,
    kinds: Iterable[str | Kind] = (Kind.IDENTITY,),
    ignore: Ignore | Sequence[Ignore] = (),
    tap: str | None = None,
    submodule: str | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    images: int = 500,
    latency_batch: int | None = None,
    cache_bytes: int = 2 * 2**30,
    seed: int = 0,
    threads: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Any:
    """Makes a trained network faster by cutting regions out of it, with a handful of unlabelled images.

    Every region is scored by the feature error that remains after 1x1 adaptors were fitted around the cut, over the
    latency that the cut saves (PRACTISE, CVPR 2023, eq. 1 to 3). The best are cut, the adaptors are folded away, and
    the rest mimics the original's features before its final pooling (MiR, CVPR 2022, eq. 5).

    Args:
        model: The network, a traced graph of it, or an exported program; it is not changed.
        loader: The calibration images: a tensor `[N, C, H, W]`, a dataset, a data loader or any iterable of batches.
        k: How many regions to cut.
        target_speedup: Alternatively, how much faster: original latency over new latency.
        target_latency_ms: Alternatively, the latency to reach, in milliseconds.
        min_agreement: Least top-1 agreement with the original on held-back calibration images.
        recipe: `fast`, `practise` (the paper's settings to the letter), or a `fxprune.options.Recipe`.
        criterion: `recovery` as above; `l2` or `kl` judge the bare cut, for comparison.
        selection: `greedy` scores again after every cut, `independent` takes the k best scores, `exact` tries all sets;
            by default what the recipe says.
        backend: Where latency counts: `torch`, `onnxruntime-cpu` or `onnxruntime-cuda`.
        device: Where recovery runs, and the `torch` backend; by default where the model is.
        kinds: Kinds of region that may be cut; see `fxprune.discover`.
        ignore: What must stay; see `fxprune.discover`.
        tap: Node or module whose output is mimicked, if not the features before the final pooling.
        submodule: Path of the part to compress, of a model that cannot be traced as a whole; see Returns.
        input_fn: Turns one of the loader's batches into a tensor, a tuple of arguments or a dict of keywords.
        images: Most calibration images to use.
        latency_batch: Images in a timed batch; by default 64 on CUDA and 8 on the CPU.
        cache_bytes: Memory for cached activations; where they do not fit, fewer images are cached. Fits side by
            side may take a quarter of it more.
        seed: Of every random draw. The same seed and number of threads give the same plan as long as measured
            latencies order the same.
        threads: Of torch and onnxruntime on the CPU; by default torch's present number.
        out: Folder for `report.json`, and for finished scores: a run that was interrupted goes on from there.
        progress: Whether to draw progress bars; by default on a terminal.

    Returns:
        A new graph module, in evaluation mode; with `submodule`, a copy of the whole model that holds it.
        `fxprune.report` tells what was done.

    Raises:
        OptionError: A setting is out of range, or more regions were asked for than can be cut.
        TraceError: The network cannot be traced.
        CalibrationError: The images cannot be used.
        NoRegionError: Nothing can be cut; the message lists why.
        DeviceError: The device is not there.
        MeasurementError: The backend cannot run the network.
    """
    place = default_device(device, model)
    options = CompressOptions(
        k=k,
        target_speedup=target_speedup,
        target_latency_ms=target_latency_ms,
        min_agreement=min_agreement,
        recipe=recipe_named(recipe),
        criterion=criterion,
        selection=selection or recipe_named(recipe).selection,
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
            calibration, network = _read(model, loader, submodule, input_fn, options)
            where = output_tap if submodule is not None and tap is None else tap
            job = open_job(
                network, calibration, options, kinds=kinds, ignore=ignore, tap=where, folder=folder, bars=bars
            )
        scores = score(job, clock)
        with clock("selection"):
            plan = choose(job, scores)
        with clock("recovery"):
            recovered, plan = repair(job, plan)
        with clock("measurement"):
            latency = on_main(lambda: compare_plans(job, [recovered.graph])[0])
            made = _report(job, plan, recovered, latency, clock)
    if folder is not None and is_main():
        write_text_atomic(folder / "report.json", made.to_json())
    _require_agreement(options, made)
    small = recovered.graph.requires_grad_(True)
    small.meta.update({_REPORT: made, _EXAMPLE: _stand_in(calibration.example(2))})
    if submodule is None:
        return small
    assert isinstance(model, nn.Module)  # _read has taken the submodule from it
    return replace_submodule(model, submodule, small, example=calibration.example(2))


def _read(
    model: Any,
    loader: Any,
    submodule: str | None,
    input_fn: Callable[[Any], Any] | None,
    options: CompressOptions,
) -> tuple[CalibrationSet, Any]:
    """The calibration images, and the network that takes them."""
    if submodule is None:
        names = input_names(model)
        return draw(loader, limit=options.images, seed=options.seed, input_fn=input_fn, names=names), model
    captured = capture_inputs(
        model,
        submodule,
        loader,
        limit=options.images,
        input_fn=input_fn,
        device=options.device,
        seed=options.seed,
    )
    return captured, model.get_submodule(submodule)


def _report(
    job: Job, plan: DropPlan, recovered: Recovered, latency: LatencyComparison, clock: Clock
) -> CompressionReport:
    fold_error = recovered.fold_error
    return CompressionReport(
        plan=plan,
        latency=latency,
        rejections=job.found.rejections,
        recovery_loss_before=recovered.loss_before,
        recovery_loss_after=recovered.loss_after,
        fold_error=worst_fold_error(job, plan) if fold_error is None else fold_error,
        parameters=(_count(job.original), _count(recovered.graph)),
        images=job.calibration.size,
        agreement=agreement(job, recovered.graph, job.calibration),
        held_back_agreement=None if job.held_back is None else agreement(job, recovered.graph, job.held_back),
        peak_memory_bytes=peak_memory(job.options.device),
        settings=settings_of(job),
        seed=job.options.seed,
        durations=clock.seconds,
        versions=versions(job.options.device),
        notes=recovered.notes,
    )


def _require_agreement(options: CompressOptions, made: CompressionReport) -> None:
    if options.min_agreement is None:
        return
    reached = made.held_back_agreement
    if reached is None:
        raise OptionError("min_agreement needs a network whose output is one score for each class")
    if reached < options.min_agreement:
        raise OptionError(
            f"min_agreement is {options.min_agreement}, but without {', '.join(made.plan.chosen)} the network agrees "
            f"with the original on {reached:.3f} of the held-back images; cut less, or give more images"
        )


def _stand_in(example: Inputs) -> Inputs:
    """Noise of the same shapes: a network that is handed on must not carry the customer's images."""
    generator = torch.Generator().manual_seed(0)
    return example.map(
        lambda t: (
            torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t.clone()
        )
    )


def _count(gm: fx.GraphModule) -> int:
    return sum(p.numel() for p in gm.parameters())


def report(gm: nn.Module) -> CompressionReport:
    """What `compress` did to a network.

    Raises:
        GraphError: The network does not come from `fxprune.compress`.
    """
    graphs = (module for module in gm.modules() if isinstance(module, fx.GraphModule))
    found = next((g.meta[_REPORT] for g in graphs if _REPORT in g.meta), None)
    if not isinstance(found, CompressionReport):
        raise GraphError("this network carries no report: fxprune.compress attaches one to what it returns")
    return found


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, **settings: Any
) -> ExportRecord:
    """Writes a network as one ONNX file, after running it in onnxruntime against torch.

    Args:
        model: Any module; a result of `compress` knows its example inputs.
        path: The file to write.
        example_inputs: A tensor, a tuple or a dict; dimension 0 is the batch and stays free.
        **settings: Of `fxprune.export.onnx_file.export_onnx`.

    Raises:
        OptionError: No example inputs were given and the model knows none.
        ExportError: The network has no ONNX form with a free batch size.
        ParityError: onnxruntime computes something else than torch; no file is written.
    """
    if example_inputs is None:
        example_inputs = getattr(model, "meta", {}).get(_EXAMPLE)
        if example_inputs is None:
            raise OptionError("give example_inputs: this network does not come from fxprune.compress")
        example_inputs = example_inputs.kwargs or example_inputs.args
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    return _export(model, path, inputs, **settings)


def measure(
    before: timing.Subject,
    after: timing.Subject,
    *,
    inputs: Sequence[Tensor] | Tensor,
    backend: Backend = "torch",
    device: str | None = None,
    settings: timing.TimingSettings | None = None,
) -> LatencyComparison:
    """Times two networks in turns, in one process.

    Args:
        before: The reference: a module, or a path to an ONNX file.
        after: The other one.
        inputs: One batch, positional.
        backend: `torch`, `onnxruntime-cpu` or `onnxruntime-cuda`.
        device: Of the `torch` backend.
        settings: How long to go on.

    Returns:
        Medians, spreads, and the ratio with its bootstrap interval.

    Raises:
        DeviceError: The device is not there; there is no fallback.
        MeasurementError: The backend cannot run one of the networks.
    """
    batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return timing.compare(before, [after], batch, backend=backend, device=device, settings=settings)[0]
