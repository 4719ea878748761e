"""The stages of the pipeline, each a function on a `Job`; `api.py` strings them together.

Under `torchrun` every process runs all of this. What is noisy (latency) or a decision (the plan) is done on rank 0 and
told to the others, so that all of them build the same network.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.deploy import latency as timing
from fxprune.deploy.positional import flat_tensors, positional
from fxprune.deploy.savings import measure_savings, without
from fxprune.errors import CalibrationError, DeviceError, GraphError, NoRegionError, OptionError
from fxprune.graph.discovery import discover
from fxprune.graph.extract import ancestors
from fxprune.graph.labels import Ignore
from fxprune.graph.regions import Discovery, Kind, Reason, Region, Rejection
from fxprune.graph.shapes import propagate_shapes
from fxprune.graph.taps import find_tap
from fxprune.graph.trace import trace
from fxprune.options import CompressOptions
from fxprune.passes import Canonicalize
from fxprune.records import LatencyComparison
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.recovery.calibration import CalibrationSet
from fxprune.recovery.criteria import Scorer, make_scorer
from fxprune.recovery.fingerprint import fingerprint_of
from fxprune.recovery.parallel import fit_all, is_main, main_first, on_main
from fxprune.recovery.planning import Planner
from fxprune.recovery.recover import Recovered, cut_and_fold, recover
from fxprune.recovery.selection import BlockScore, DropPlan, largest_plan
from fxprune.recovery.store import ScoreStore, StoredScorer, stored_latency

__all__ = [
    "Clock",
    "Job",
    "agreement",
    "choose",
    "compare_plans",
    "default_device",
    "input_names",
    "open_job",
    "repair",
    "score",
    "settings_of",
    "using_threads",
    "worst_fold_error",
]

_SLACK = 0.05
"""A plan is timed as a whole once its regions' savings add up to the target, less this much."""


class Clock:
    """Seconds that each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time that a `with` block takes to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class Job:
    """One compression under way.

    Attributes:
        original: A private, frozen copy of the network, with shapes.
        found: Regions and rejections.
        tap: Where features are compared.
        calibration: Images to fit on.
        held_back: Images kept apart for `min_agreement`, None without it.
        options: What was asked for.
        scorer: Tells what cuts cost; remembers on disk where a folder was given.
        store: The memory itself, None without a folder.
        bars: Whether this process draws progress bars.
        fits: Fitted adaptors of single regions, by label.
    """

    original: fx.GraphModule
    found: Discovery
    tap: tuple[str, ...]
    calibration: CalibrationSet
    held_back: CalibrationSet | None
    options: CompressOptions
    scorer: Scorer
    store: ScoreStore | None
    bars: bool
    fits: dict[str, AdaptorFit] = field(default_factory=dict)


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads for a while; onnxruntime takes the same.

    Raises:
        OptionError: The number is below 1.
    """
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise OptionError(f"threads is {count}; it must be 1 or more")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_device(device: str | None, model: Any) -> str:
    """The device to work on: the one asked for, else where the model is.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
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


def input_names(model: Any) -> tuple[str, ...]:
    """Names of the network's inputs, for loaders whose batches are dicts."""
    if isinstance(model, fx.GraphModule):
        return tuple(str(node.target) for node in model.graph.find_nodes(op="placeholder"))
    return tuple(inspect.signature(model.forward).parameters) if isinstance(model, nn.Module) else ()


def open_job(
    model: Any,
    calibration: CalibrationSet,
    options: CompressOptions,
    *,
    kinds: Iterable[str | Kind],
    ignore: Ignore | Sequence[Ignore],
    tap: str | Callable[[fx.GraphModule], tuple[str, ...]] | None,
    folder: Path | None,
    bars: bool,
) -> Job:
    """Traces, discovers and finds the tap; every refusal comes from here, before any long work."""
    original = _capture(model, calibration, options.device)
    features = tap(original) if callable(tap) else find_tap(original, tap)
    found = _discover(original, kinds, ignore, features, options)
    held_back = None
    if options.min_agreement is not None:
        held_back, calibration = calibration.split(0.2, options.seed)
    scorer = make_scorer(
        original,
        features,
        calibration,
        options.recipe,
        options.criterion,
        device=options.device,
        seed=options.seed,
        cache_bytes=options.cache_bytes,
        progress=bars,
    )
    store = None
    if folder is not None:
        key = fingerprint_of(
            original, calibration, {**options.scoring(), "tap": features, "threads": torch.get_num_threads()}
        )
        store = main_first(lambda: ScoreStore(folder / "scores", key))
        scorer = StoredScorer(scorer, store)
    return Job(original, found, features, calibration, held_back, options, scorer, store, bars and is_main())


def _capture(model: Any, calibration: CalibrationSet, device: str) -> fx.GraphModule:
    """A private copy of the network with shapes on every node: the only place where the caller's model is read."""
    example = calibration.example(2)
    home = example.to(default_device(None, model))
    _check_type(model, calibration)
    inputs = None if isinstance(model, fx.GraphModule) else (home.kwargs or home.args)
    try:
        traced = trace(model, inputs)
    except GraphError as error:
        raise _unfit(calibration, error) from error
    Canonicalize()(traced)
    traced.to(device).requires_grad_(False)
    placed = example.to(device)
    try:
        propagate_shapes(traced, placed.args, placed.kwargs)
    except GraphError as error:
        raise _unfit(calibration, error) from error
    return traced


def _unfit(calibration: CalibrationSet, error: GraphError) -> CalibrationError:
    shapes = [tuple(t.shape) for t in calibration.inputs.tensors()]
    return CalibrationError(f"the network does not accept the calibration images of shape {shapes}: {error}")


def _check_type(model: Any, calibration: CalibrationSet) -> None:
    tensors = list(model.parameters()) + list(model.buffers()) if isinstance(model, nn.Module) else []
    if any(t.is_meta for t in tensors):
        raise GraphError("the network's weights are on the meta device: load them before compressing")
    types = {t.dtype for t in tensors if t.is_floating_point()}
    half = sorted(str(t) for t in types & {torch.float16, torch.bfloat16})
    if half:
        raise GraphError(
            f"the network's weights are {', '.join(half)}; recovery needs float32: call model.float() first, and "
            "convert the result back"
        )
    first = calibration.inputs.tensors()[0]
    if len(types) == 1 and first.is_floating_point() and first.dtype not in types:
        raise CalibrationError(
            f"the images are {first.dtype}, the network's weights {types.pop()}; convert the images"
        )


def _in_front_of(gm: fx.GraphModule, tap: Sequence[str], found: Discovery) -> Discovery:
    """Refuses the regions that the tap does not see."""
    seen = ancestors(gm, tap)
    behind = tuple(
        Rejection(r.entry, r.exit, Reason.BEHIND_TAP, (r.exit,), f"the tap is {', '.join(tap)}", r.label)
        for r in found.regions
        if r.exit not in seen
    )
    return Discovery(tuple(r for r in found.regions if r.exit in seen), found.rejections + behind)


def _discover(
    gm: fx.GraphModule,
    kinds: Iterable[str | Kind],
    ignore: Ignore | Sequence[Ignore],
    tap: Sequence[str],
    options: CompressOptions,
) -> Discovery:
    found = _in_front_of(gm, tap, discover(gm, kinds=kinds, ignore=ignore))
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


def score(job: Job, clock: Clock) -> tuple[BlockScore, ...]:
    """Measures what every region saves, checks that a target is within reach, then fits what every region costs."""
    regions = job.found.regions
    with clock("latency"):
        savings = on_main(lambda: stored_latency(job.store, "savings", lambda: _savings(job)))
        _check_reach(job)
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


def _check_reach(job: Job) -> None:
    """Refuses a latency target that even the smallest possible network misses."""
    if job.options.k is not None:
        return
    everything: list[Region] = []
    for region in sorted(job.found.regions, key=lambda r: len(r.body)):
        if not any(region.overlaps(other) for other in everything):
            everything.append(region)
    measured = on_main(lambda: _timed(job, everything))
    if not _meets(job.options, measured):
        raise OptionError(
            f"{_target(job.options)} is out of reach: without all {len(everything)} regions the network takes "
            f"{1e3 * measured.after.median_s:.3f} ms instead of {1e3 * measured.before.median_s:.3f} ms, "
            f"{1 / measured.ratio:.2f} times as fast ({job.options.backend}, batch {job.options.latency_batch})"
        )


def choose(job: Job, scores: Sequence[BlockScore]) -> DropPlan:
    """The plan: k regions, or the first plan on the path that meets the target, measured as a whole."""

    def joint_loss(sets: Sequence[Sequence[Region]]) -> list[float]:
        return [job.scorer.estimate(regions) for regions in sets]

    planner = Planner(scores, joint_loss, job.options.selection)
    chosen = on_main(
        lambda: planner.of_size(job.options.k) if job.options.k is not None else _first_to_meet(job, planner)
    )
    return DropPlan(tuple(scores), chosen)


def _first_to_meet(job: Job, planner: Planner) -> tuple[Region, ...]:
    options = job.options
    measured: LatencyComparison | None = None
    reference = next(iter(planner.scores)).latency.before.median_s
    if options.target_speedup is not None:
        wanted = 1.0 / options.target_speedup
    else:
        assert options.target_latency_ms is not None
        wanted = options.target_latency_ms / (1e3 * reference)
    for plan in planner.path():
        if 1.0 - planner.saving(plan) > wanted + _SLACK:
            continue
        measured = _timed(job, plan)
        if _meets(options, measured):
            return plan
    best = (
        "no region saves time beyond the noise"
        if measured is None
        else f"{1 / measured.ratio:.2f} times as fast"
    )
    raise OptionError(f"{_target(options)} is out of reach: the furthest plan is {best} ({options.backend})")


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
        fit = fit_all(job.scorer, [plan.regions])[0]
        maps = dict(fit.maps)
        plan = DropPlan(plan.scores, plan.regions, fit.loss)
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
