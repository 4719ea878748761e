"""The pipeline: `compress` reads top to bottom as the drawing in docs/architecture.md does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.deploy import latency as timing
from fxprune.deploy.artifact import check_writable, write_text_atomic
from fxprune.deploy.environment import versions
from fxprune.deploy.export import ExportRecord
from fxprune.deploy.export import export_onnx as _export
from fxprune.deploy.positional import flat_tensors, positional
from fxprune.deploy.savings import measure_savings
from fxprune.errors import CalibrationError, DeviceError, GraphError, NoRegionError, OptionError
from fxprune.graph.discovery import discover
from fxprune.graph.labels import Ignore
from fxprune.graph.regions import Discovery, Kind, Region
from fxprune.graph.shapes import propagate_shapes
from fxprune.graph.taps import find_tap
from fxprune.graph.trace import trace
from fxprune.options import Backend, CompressOptions, Criterion, Recipe, Selection, recipe_named
from fxprune.passes import Canonicalize
from fxprune.records import LatencyComparison
from fxprune.recovery.calibration import CalibrationSet, draw
from fxprune.recovery.criteria import Scorer, make_scorer
from fxprune.recovery.inputs import Inputs
from fxprune.recovery.recover import cut_and_fold, recover
from fxprune.recovery.selection import BlockScore, DropPlan, largest_plan, select_independent
from fxprune.reports.records import CompressionReport

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
    selection: Selection = "independent",
    backend: Backend = "torch",
    device: str | None = None,
    kinds: Iterable[str | Kind] = (Kind.IDENTITY,),
    ignore: Ignore | Sequence[Ignore] = (),
    tap: str | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    images: int = 500,
    latency_batch: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> fx.GraphModule:
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
        selection: `independent` takes the k best scores.
        backend: Where latency counts: `torch`, `onnxruntime-cpu` or `onnxruntime-cuda`.
        device: Where recovery runs, and the `torch` backend; by default where the model is.
        kinds: Kinds of region that may be cut; see `fxprune.discover`.
        ignore: What must stay; see `fxprune.discover`.
        tap: Node or module whose output is mimicked, if not the features before the final pooling.
        input_fn: Turns one of the loader's batches into a tensor, a tuple of arguments or a dict of keywords.
        images: Most calibration images to use.
        latency_batch: Images in a timed batch; by default 64 on CUDA and 8 on the CPU.
        seed: Of every random draw. The same seed gives the same plan as long as measured latencies order the same.
        threads: Of torch and onnxruntime on the CPU; by default torch's present number.
        out: Folder for `report.json`.
        progress: Whether to draw progress bars; by default on a terminal.

    Returns:
        A new graph module, in evaluation mode; `fxprune.report` tells what was done.

    Raises:
        OptionError: A setting is out of range, or more regions were asked for than can be cut.
        TraceError: The network cannot be traced.
        CalibrationError: The images cannot be used.
        NoRegionError: Nothing can be cut; the message lists why.
        DeviceError: The device is not there.
        MeasurementError: The backend cannot run the network.
    """
    place = _device(device, model)
    options = CompressOptions(
        k=k,
        target_speedup=target_speedup,
        target_latency_ms=target_latency_ms,
        min_agreement=min_agreement,
        recipe=recipe_named(recipe),
        criterion=criterion,
        selection=selection,
        backend=backend,
        device=place,
        images=images,
        latency_batch=latency_batch or (64 if place.startswith("cuda") else 8),
        seed=seed,
    )
    folder = None if out is None else check_writable(out)
    bars = os.isatty(2) if progress is None else progress
    clock = _Clock()
    with _threads(threads):
        with clock("calibration"):
            calibration = draw(loader, limit=images, seed=seed, input_fn=input_fn, names=_input_names(model))
        with clock("trace"):
            original = _capture(model, calibration, place)
            found = _discover(original, kinds, ignore, options)
            features = find_tap(original, tap)
        with clock("latency"):
            savings = _savings(original, found.regions, calibration, options)
        with clock("scoring"):
            scorer = make_scorer(
                original,
                features,
                calibration,
                options.recipe,
                options.criterion,
                device=place,
                seed=seed,
                progress=bars,
            )
            plan, fold_error = _plan(original, found.regions, savings, scorer, features, calibration, options)
        with clock("recovery"):
            maps = scorer.fit(plan.regions).maps if options.recipe.fold_first else {}
            recovered = recover(
                original,
                plan.regions,
                maps,
                features,
                calibration,
                options.recipe,
                device=place,
                seed=seed,
                progress=bars,
            )
        small = recovered.graph
        with clock("measurement"):
            latency = _final_latency(original, small, calibration, options)
            agreement = _agreement(original, small, calibration, place)
    made = CompressionReport(
        plan=plan,
        latency=latency,
        rejections=found.rejections,
        recovery_loss_before=recovered.loss_before,
        recovery_loss_after=recovered.loss_after,
        fold_error=recovered.fold_error if recovered.fold_error is not None else fold_error,
        parameters=(_count(original), _count(small)),
        images=calibration.size,
        agreement=agreement,
        settings=_plain_settings(options, features),
        seed=seed,
        durations=clock.seconds,
        versions=versions(place),
    )
    if folder is not None:
        write_text_atomic(folder / "report.json", made.to_json())
    return _finish(small, made, calibration, model)


def report(gm: fx.GraphModule) -> CompressionReport:
    """What `compress` did to a network.

    Raises:
        GraphError: The network does not come from `fxprune.compress`.
    """
    found = gm.meta.get(_REPORT)
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
        **settings: Of `fxprune.deploy.export.export_onnx`.

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


class _Clock:
    """Seconds that each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise OptionError(f"threads is {count}; it must be 1 or more")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(device: str | None, model: Any) -> str:
    if device is None:
        tensors = model.parameters() if isinstance(model, nn.Module) else iter(())
        first = next(iter(tensors), None)
        return str(first.device) if first is not None and first.device.type != "meta" else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {device} was asked for, but torch sees no CUDA device; install a driver and a CUDA build of "
            "torch, or leave device out to run on the CPU"
        )
    return device


def _input_names(model: Any) -> tuple[str, ...]:
    import inspect

    if isinstance(model, fx.GraphModule):
        return tuple(str(node.target) for node in model.graph.find_nodes(op="placeholder"))
    return tuple(inspect.signature(model.forward).parameters) if isinstance(model, nn.Module) else ()


def _capture(model: Any, calibration: CalibrationSet, device: str) -> fx.GraphModule:
    """A private copy of the network with shapes on every node: the only place where the caller's model is read."""
    example = calibration.example(2)
    inputs = example.kwargs or example.args
    home = example.to(_device(None, model))
    traced = trace(model, None if isinstance(model, fx.GraphModule) else (home.kwargs or home.args))
    Canonicalize()(traced)
    tensors = [*traced.parameters(), *traced.buffers()]
    if any(t.is_meta for t in tensors):
        raise GraphError("the network's weights are on the meta device: load them before compressing")
    half = {str(p.dtype) for p in traced.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if half:
        raise GraphError(
            f"the network's weights are {', '.join(sorted(half))}; recovery needs float32: call model.float() "
            "first, and convert the result back"
        )
    _check_inputs(traced, calibration)
    traced.to(device).requires_grad_(False)
    placed = example.to(device)
    try:
        propagate_shapes(traced, placed.args, placed.kwargs)
    except GraphError as error:
        shapes = [tuple(t.shape) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
        raise CalibrationError(
            f"the network does not accept the calibration images of shape {shapes}: {error}"
        ) from error
    return traced


def _check_inputs(gm: fx.GraphModule, calibration: CalibrationSet) -> None:
    weights = next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)
    first = calibration.inputs.tensors()[0]
    if weights is not None and first.is_floating_point() and first.dtype != weights:
        raise CalibrationError(
            f"the images are {first.dtype}, the network's weights {weights}; convert the images"
        )


def _discover(
    gm: fx.GraphModule,
    kinds: Iterable[str | Kind],
    ignore: Ignore | Sequence[Ignore],
    options: CompressOptions,
) -> Discovery:
    found = discover(gm, kinds=kinds, ignore=ignore)
    if not found.regions:
        reasons = "\n".join(
            f"  {r.label or r.exit}: {r.reason.value} ({r.detail})" for r in found.rejections[:20]
        )
        more = f"\n  and {len(found.rejections) - 20} more" if len(found.rejections) > 20 else ""
        raise NoRegionError(
            "no region of this network can be dropped. Candidates refused:\n"
            f"{reasons or '  there is no join at all'}{more}\n"
            "kinds=('identity', 'projection', 'sequential') would look for more kinds"
        )
    most = largest_plan(found.regions)
    if options.k is not None and options.k > most:
        raise OptionError(
            f"k is {options.k}, but at most {most} regions of this network can be dropped together"
        )
    return found


def _timed_inputs(calibration: CalibrationSet, options: CompressOptions) -> Inputs:
    wanted = options.latency_batch
    index = torch.arange(wanted) % calibration.size
    return calibration.inputs.select(index)


def _savings(
    gm: fx.GraphModule, regions: Sequence[Region], calibration: CalibrationSet, options: CompressOptions
) -> tuple[LatencyComparison, ...]:
    batch = _timed_inputs(calibration, options)
    return measure_savings(
        gm,
        regions,
        flat_tensors(batch),
        lambda network: positional(network, batch),
        backend=options.backend,
        device=options.device,
    )


def _plan(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    savings: Sequence[LatencyComparison],
    scorer: Scorer,
    tap: Sequence[str],
    calibration: CalibrationSet,
    options: CompressOptions,
) -> tuple[DropPlan, float | None]:
    """The plan, and the worst fold error among the adaptors that its regions were scored with."""
    scorer.prepare([[region] for region in regions])
    fits = {region.label: scorer.fit([region]) for region in regions}
    scores = tuple(
        BlockScore(region, fits[region.label].loss, fits[region.label].loss_before, saving)
        for region, saving in zip(regions, savings, strict=True)
    )
    assert options.k is not None
    plan = DropPlan(scores, select_independent(scores, options.k))
    errors = [
        cut_and_fold(gm, [region], fits[region.label].maps, tap, calibration, device=options.device)[1]
        for region in plan.regions
    ]
    return plan, max((error for error in errors if error is not None), default=None)


def _final_latency(
    original: fx.GraphModule, small: fx.GraphModule, calibration: CalibrationSet, options: CompressOptions
) -> LatencyComparison:
    batch = _timed_inputs(calibration, options)
    return timing.compare(
        positional(original, batch),
        [positional(small, batch)],
        flat_tensors(batch),
        backend=options.backend,
        device=options.device if options.backend == "torch" else None,
    )[0]


@torch.no_grad()
def _agreement(
    original: fx.GraphModule, small: fx.GraphModule, calibration: CalibrationSet, device: str
) -> float | None:
    same = 0
    for batch in calibration.batches(64):
        inputs = batch.to(device)
        answers = [g(*inputs.args, **inputs.kwargs) for g in (original, small)]
        if not all(isinstance(a, Tensor) and a.dim() == 2 and a.shape[1] > 1 for a in answers):
            return None
        same += int((answers[0].argmax(1) == answers[1].argmax(1)).sum())
    return same / calibration.size


def _count(gm: fx.GraphModule) -> int:
    return sum(p.numel() for p in gm.parameters())


def _plain_settings(options: CompressOptions, tap: Sequence[str]) -> dict[str, Any]:
    return {**asdict(options), "tap": list(tap), "threads": torch.get_num_threads()}


def _finish(
    small: fx.GraphModule, made: CompressionReport, calibration: CalibrationSet, model: Any
) -> fx.GraphModule:
    """The result as users get it: trainable again, with its report."""
    small.requires_grad_(True)
    small.meta[_REPORT] = made
    small.meta[_EXAMPLE] = calibration.example(2)
    return small
