"""Opening a job: from a network, images and options to everything that the stages work on.

Every refusal comes from here, before any long work.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxprune.calibration.batches import CalibrationSet
from fxprune.discovery.discovery import discover
from fxprune.discovery.labels import Ignore
from fxprune.discovery.taps import find_tap
from fxprune.errors import CalibrationError, DeviceError, GraphError, NoRegionError, OptionError
from fxprune.graph.extract import ancestors
from fxprune.graph.regions import Discovery, Kind, Reason, Region, Rejection
from fxprune.graph.shapes import propagate_shapes
from fxprune.graph.trace import trace
from fxprune.options import CompressOptions, Criterion, Recipe
from fxprune.passes import Prepare
from fxprune.processes.group import is_main, main_first
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.scoring.bare import BareScorer
from fxprune.scoring.cached import CachedScorer
from fxprune.scoring.end_to_end import EndToEndScorer
from fxprune.scoring.fingerprint import fingerprint_of
from fxprune.scoring.scorer import Scorer
from fxprune.scoring.store import ScoreStore
from fxprune.scoring.stored import StoredScorer
from fxprune.selection.plans import largest_plan
from fxprune.timing.savings import SCORING

__all__ = ["Clock", "Job", "default_device", "input_names", "open_job"]


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

    def parts(self, regions: Sequence[Region]) -> list[AdaptorFit]:
        """Fits of a set's single regions, for a fit of the set to begin at; none where they were not scored."""
        return [self.fits[region.label] for region in regions] if self.fits else []


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
        settings = {
            **options.scoring(),
            "tap": features,
            "threads": torch.get_num_threads(),
            "timing": asdict(SCORING),
        }
        key = fingerprint_of(original, calibration, settings)
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
    _check_finite(traced)
    Prepare()(traced)
    traced.to(device).requires_grad_(False)
    placed = example.to(device)
    try:
        propagate_shapes(traced, placed.args, placed.kwargs)
    except GraphError as error:
        raise _unfit(calibration, error) from error
    return traced


def _check_finite(gm: fx.GraphModule) -> None:
    bad = [n for n, p in gm.named_parameters() if not p.is_meta and not bool(torch.isfinite(p).all())]
    if bad:
        raise CalibrationError(
            f"weights are nan or infinite: {', '.join(bad[:4])}; check how they were loaded"
        )


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
    most = len(largest_plan(found.regions))
    if options.k is not None and options.k > most:
        raise OptionError(
            f"k is {options.k}, but at most {most} regions of this network can be dropped together"
        )
    return found


def make_scorer(
    gm: fx.GraphModule,
    tap: Sequence[str],
    calibration: CalibrationSet,
    recipe: Recipe,
    criterion: Criterion,
    *,
    device: str,
    seed: int,
    cache_bytes: int = 2 * 2**30,
    progress: bool = False,
) -> Scorer:
    """The scorer that a recipe and a criterion ask for."""
    if criterion != "recovery":
        return BareScorer(gm, tap, calibration, criterion, device)
    if recipe.scorer == "cached":
        return CachedScorer(
            gm, tap, calibration, recipe.adaptor, device=device, seed=seed, cache_bytes=cache_bytes
        )
    return EndToEndScorer(gm, tap, calibration, recipe, device=device, seed=seed, progress=progress)
