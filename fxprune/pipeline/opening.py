"""Opening a job: from a model, a loader and options to everything that the stages work on.

Every refusal comes from here, before any long work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import fx, nn

from fxprune.artifacts.results import SWEEP_FILES, require_replaceable
from fxprune.artifacts.saving import FILES
from fxprune.backends import runs_modules
from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.labelled import LabelledImages
from fxprune.discovery.discovery import discover
from fxprune.discovery.taps import find_tap
from fxprune.errors import (
    ArtifactError,
    NoRegionError,
    OptionError,
)
from fxprune.files import check_writable
from fxprune.graph.call import input_names
from fxprune.graph.extract import ancestors
from fxprune.graph.regions import Discovery, Reason, Rejection
from fxprune.judging.answers import alike, answers, entropy
from fxprune.judging.judge import Evaluate, Judge
from fxprune.memory import memory_explained, memory_kept
from fxprune.options import Options
from fxprune.pipeline.capturing import captured, captured_parts, device_for, opaque_notes
from fxprune.pipeline.job import Job, StageTimes
from fxprune.processes.group import is_main, main_first
from fxprune.processes.threads import default_threads, using_threads
from fxprune.progress import is_wanted
from fxprune.recovery.original import Original
from fxprune.scoring.bare import BareScorer
from fxprune.scoring.cached import CachedScorer
from fxprune.scoring.end_to_end import EndToEndScorer
from fxprune.scoring.fingerprint import fingerprint_of
from fxprune.scoring.scorer import Scorer
from fxprune.scoring.store import ScoreStore, content_of
from fxprune.scoring.stored import StoredScorer
from fxprune.selection.plans import largest_plan
from fxprune.submodules.parts import WEIGHED_BY, comparable
from fxprune.timing.latency import device_of
from fxprune.tracing.unwrap import unwrapped

__all__ = ["HELD_BACK", "make_job", "make_scorer", "open_job"]

logger = logging.getLogger(__name__)

HELD_BACK = 0.2
"""Share of the images to which nothing is fitted."""
_ENOUGH_TO_HOLD_BACK = 20
"""Images from which on some are held back unasked: a fifth of fewer says little, and every image helps fitting."""
_LISTED = 20


@contextmanager
def open_job(model: Any, loader: Any, options: Options, evaluate: Evaluate | None = None) -> Iterator[Job]:
    """Reads the images, traces, discovers and finds the tap; while the job is open, its folder is locked.

    Args:
        model: The caller's model; it is not changed.
        loader: The calibration images.
        options: What was asked for.
        evaluate: The caller's own measure of a network.

    Raises:
        FxpruneError: As `fxprune.compress` says.
    """
    model = unwrapped(model)
    if options.paths and not isinstance(model, nn.Module):
        raise OptionError("submodule= names a part of a module, and an exported program has none")
    if len(options.paths) > 1 and options.tap is not None:
        raise OptionError(
            "tap names one value, and several parts return one each: leave it out, or name one part"
        )
    if options.paths and (options.labels is not None or evaluate is not None):
        raise OptionError(
            "labels and evaluate are for networks that are compressed as a whole, and the part that submodule= names "
            "has no accuracy of its own: measure the model that compress returns"
        )
    if not runs_modules(options.backend):
        device_of(options.backend)  # one that is missing is said before any work
    options = options.filled(device_for(model, options.device), options.threads or default_threads())
    with using_threads(options.threads), _plain_torch(), memory_explained(), memory_kept():
        folder = None if options.out is None else main_first(lambda: _prepared(str(options.out)))
        with _locked(folder):
            yield make_job(model, loader, options, folder, evaluate)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Leaves the caller's inference mode, and another default device than the CPU, for as long as a job is open."""
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.inference_mode(False), torch.device("cpu") if elsewhere else nullcontext():
        yield


def make_job(
    model: Any,
    loader: Any,
    options: Options,
    folder: Path | None = None,
    evaluate: Evaluate | None = None,
) -> Job:
    """The job itself, without what surrounds it while it is open; its options have their defaults filled in."""
    stage = StageTimes()
    show_progress = is_main() and is_wanted(options.progress)
    with stage("trace"):
        network = (
            captured_parts(model, loader, options) if options.paths else captured(model, loader, options)
        )
        graph, images = network.graph, network.images
        labels = None
        if options.labels is not None:
            labels = LabelledImages(options.labels, images, options, input_names(model))
        trainable = frozenset(name for name, p in graph.named_parameters() if p.requires_grad)
        graph.requires_grad_(False)
        if network.parts is None or options.tap is not None:
            tap = find_tap(graph, options.tap)
        else:
            tap = comparable(graph, network.parts, images.example(WEIGHED_BY).to(str(options.device)))
        discovery = _discover(graph, tap, options)
        spread, look_alike = _spread(graph, images, options)
        held_back = None
        if images.size >= _ENOUGH_TO_HOLD_BACK or options.min_agreement is not None:
            held_back, images = images.split(HELD_BACK, options.seed)
        original = Original(graph, tap, images, str(options.device), options.seed)
        scorer, store = make_scorer(original, options, progress=show_progress), None
        if folder is not None:
            store = _store(folder, original, discovery, options)
            # nobody can tell whether a function is still the same one
            scorer = scorer if callable(options.criterion) else StoredScorer(scorer, store)
    judge = Judge(labels, evaluate, original.device)
    # now, so that labels and functions that cannot be used are refused before any long work
    with stage("evaluation"):
        judged = judge(graph)
    return Job(
        options,
        model,
        network.parts,
        network.whole,
        original,
        trainable,
        discovery,
        held_back,
        spread,
        (*network.notes, *look_alike),
        judge,
        judged,
        scorer,
        store,
        folder,
        show_progress,
        stage,
    )


def _spread(
    graph: fx.GraphModule, images: CalibrationSet, options: Options
) -> tuple[float | None, tuple[str, ...]]:
    """The entropy of the original's classes on the images, and what the user should know about it."""
    named = answers(graph, images, str(options.device))
    if named is None and options.min_agreement is not None:
        raise OptionError("min_agreement needs a network whose output is one score for each class")
    note = alike(named)
    if note is not None:
        logger.warning("%s", note)
    return entropy(named), () if note is None else (note,)


def make_scorer(original: Original, options: Options, *, progress: bool = False) -> Scorer:
    """The scorer that a recipe and a criterion ask for."""
    if options.criterion != "recovery":
        return BareScorer(original, options.criterion)
    if options.recipe.scorer == "cached":
        return CachedScorer(original, options.recipe.adaptor, cache_bytes=options.cache_bytes)
    return EndToEndScorer(original, options.recipe.adaptor, progress=progress)


def _prepared(out: str) -> Path:
    """The folder for results and finished work, once it is sure that both can be written."""
    folder = check_writable(out)
    require_replaceable(folder, ("report.json", *FILES, *SWEEP_FILES), check_writable(folder / "scores"))
    return folder


@contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """Keeps other runs out of a folder: what two write there at once would be neither's."""
    if folder is None or not is_main():
        yield
        return
    try:
        lock = FileLock(folder / "scores" / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise ArtifactError(
            f"{folder} is in use: another run works in it at this moment. Wait for its end, or name another folder"
        ) from error
    with lock:
        yield


def _store(folder: Path, original: Original, discovery: Discovery, options: Options) -> ScoreStore:
    """Everything that scores depend on, and that neither the graph nor the images tell, is a part of the key."""
    settings = {
        "scorer": options.recipe.scorer,
        "adaptor": options.recipe.adaptor,
        "criterion": options.to_dict()["criterion"],
        "regions": content_of(discovery.regions),
        "tap": original.tap,
        "device": original.device,
        "seed": original.seed,
        "cache_bytes": options.cache_bytes,
        "threads": options.threads,
    }
    fingerprint = fingerprint_of(original, settings)
    return main_first(lambda: ScoreStore(folder / "scores", fingerprint))


def _discover(graph: fx.GraphModule, tap: Sequence[str], options: Options) -> Discovery:
    found = _in_front_of(graph, tap, discover(graph, kinds=options.kinds, ignore=options.ignore))
    if not found.regions:
        refused = [f"  {r.label or r.exit}: {r.reason.value} ({r.detail})" for r in found.rejections]
        if len(refused) > _LISTED:
            refused[_LISTED:] = [f"  and {len(refused) - _LISTED} more"]
        raise NoRegionError(
            "no region of this network can be dropped. Candidates refused:\n"
            + "\n".join([*(refused or ["  there is no join at all"]), *opaque_notes(graph)])
            + "\nkinds=('identity', 'projection', 'sequential') would look for more kinds"
        )
    most = len(largest_plan(found.regions))
    if options.k is not None and options.k > most:
        raise OptionError(
            f"k is {options.k}, but at most {most} regions of this network can be dropped together"
        )
    return found


def _in_front_of(graph: fx.GraphModule, tap: Sequence[str], found: Discovery) -> Discovery:
    """Refuses the regions that the tap does not see."""
    seen = ancestors(graph, tap)
    behind = tuple(
        Rejection(r.entry, r.exit, Reason.BEHIND_TAP, (r.exit,), f"the tap is {', '.join(tap)}", r.label)
        for r in found.regions
        if not seen.issuperset(call.exit for call in r.calls)
    )
    gone = {r.label for r in behind}
    return Discovery(tuple(r for r in found.regions if r.label not in gone), found.rejections + behind)
