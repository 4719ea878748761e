"""From a chosen set of regions to a recovered network: cut, fold the adaptors, mimic."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.regions import AdaptorSite, Region
from fxprune.options import FitSettings
from fxprune.passes import Cut, FoldAdaptors
from fxprune.placement.placement import find_sites
from fxprune.recovery.comparison import Comparison, Pair
from fxprune.recovery.features import FeatureReader, surviving_tap
from fxprune.recovery.fidelity import Fidelities, fidelity
from fxprune.recovery.mimicking import ON_ALL, Mimicking, mimic
from fxprune.recovery.original import Original
from fxprune.recovery.training import fixed_norms, trainable_parameters
from fxprune.validation import shortened

__all__ = ["Recovered", "cut_and_fold", "recover"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """A compressed network and what recovery measured on the way.

    Attributes:
        graph: The network, sharing nothing with the original.
        before: How near it was to the original before mimicking: cut, adaptors folded.
        after: The same after it; on the held-back images before the final iterations.
        fold_error: See `CompressionReport`.
        notes: What the user should know.
        mimicking: How the fits of mimicking went, in their order; empty where there was nothing to train.
    """

    graph: fx.GraphModule
    before: Fidelities
    after: Fidelities
    fold_error: float | None
    notes: tuple[str, ...] = ()
    mimicking: tuple[Mimicking, ...] = ()

    @property
    def loss_before(self) -> float:
        """Mean squared error at the tap before mimicking, on the fitted images."""
        return self.before.fitted.feature_error

    @property
    def loss_after(self) -> float:
        """The same after it."""
        return self.after.fitted.feature_error


@torch.no_grad()
def cut_and_fold(
    original: Original, regions: Sequence[Region], maps: Mapping[AdaptorSite, Tensor]
) -> tuple[fx.GraphModule, float | None]:
    """A copy of a network without some regions, with fitted adaptors folded in.

    Args:
        original: The network; copied.
        regions: What to drop.
        maps: Adaptors by site; sites without a map get none.

    Returns:
        The copy, and the fold error: the largest difference of the features between adaptors in place and folded,
        relative to the largest feature; None when there are no maps.
    """
    student = copy.deepcopy(original.graph)
    Cut(regions, maps, fold=False)(student)
    if not maps:
        return student, None
    survivors = surviving_tap(original.tap, regions)
    example = original.images.example(8).to(original.device)
    inserted = FeatureReader(student, survivors)(example)
    FoldAdaptors()(student)
    folded = FeatureReader(student, survivors)(example)
    largest = max(float(t.abs().max()) for t in inserted)
    error = max(float((a - b).abs().max()) for a, b in zip(inserted, folded, strict=True))
    return student, error / max(largest, torch.finfo(torch.float32).tiny)


def recover(
    original: Original,
    regions: Sequence[Region],
    maps: Mapping[AdaptorSite, Tensor],
    settings: FitSettings,
    *,
    held_back: CalibrationSet | None = None,
    cache_bytes: int = 0,
    progress: bool = False,
) -> Recovered:
    """Cuts a set of regions and repairs the rest by mimicking the original (MiR; PRACTISE, eq. 4).

    Args:
        original: The network; what lies behind its tap, the classifier, stays as it is.
        regions: What to drop.
        maps: Fitted adaptors to fold in first; empty for PRACTISE, which mimics from the bare cut.
        settings: Of the mimicking.
        held_back: Images to measure on beside those of the original, and to tell which settings and which state of
            mimicking are the best; nothing but the final iterations is fitted to them. Without, the fitted images tell.
        cache_bytes: Memory for what lies before the first change to be computed once, where it is left alone.
        progress: Whether to draw a progress bar.
    """
    student, fold_error = cut_and_fold(original, regions, maps)
    # of images as they are given: what is kept in their place has other sizes
    settings = replace(settings, batch_size=original.images_per_step(settings), max_pixels=None)
    measure = partial(fidelity, original, student, regions)
    before = Fidelities(measure(original.images), None if held_back is None else measure(held_back))
    placement = find_sites(original.graph, regions)
    operators = [site.operator for site in maps or placement.sites]
    if any(
        region.twins for region in regions
    ):  # weights with several calls take no adaptor: mimicking changes them
        operators += [refusal.operator for refusal in placement.refused]
    pair = Pair(original, student, regions, operators)
    whole = pair.at_tap(changed_only=settings.changed_only, junctions=settings.junctions)
    near = pair.at_near_junctions() if settings.near_cuts else None
    title, comparison = ("at the tap", whole) if near is None else ("near the cuts", near)
    parameters = trainable_parameters(comparison.student, student)
    if not parameters or not settings.iterations:
        return Recovered(student, before, before, fold_error)
    sets = [original.images] if held_back is None else [original.images, held_back]
    if settings.changed_only and (kept := _kept(comparison, sets, original.device, cache_bytes)):
        sets, whole, comparison = kept, whole.behind(), comparison.behind()

    def fitted_to(images: CalibrationSet, judges: CalibrationSet, fit: FitSettings, title: str) -> Mimicking:
        return mimic(
            student,
            comparison,
            parameters,
            replace(original, images=images),
            fit,
            whole.judge(judges, original.device, cache_bytes // 4),
            title=title,
            progress=progress,
        )

    done = [fitted_to(sets[0], sets[-1], settings, title)]
    after_held_back = None if held_back is None else measure(held_back)
    notes = _norms_that_stay(whole.student, settings)
    last, best = done[0].last, done[0].best
    if not best:
        rates = sorted({attempt.learning_rate for attempt in done[0].attempts}, reverse=True)
        tried = ", ".join(f"{rate:g}" for rate in rates)
        notes.append(
            f"mimicking, at a learning rate of {tried}, did not lower the feature error, so it was undone"
        )
    for note in notes:
        logger.warning("%s", note)
    if best and held_back is not None and settings.final_iterations:
        everything = sets[0].joined(sets[1])
        final = replace(
            settings,
            iterations=settings.final_iterations,
            looks=1,  # they take as long as the images are many, and nothing is left to choose
            rates=(_next_smaller(settings, last.learning_rate),),
            batch_norm=last.batch_norm,
        )
        done.append(fitted_to(everything, everything, final, ON_ALL))
        if done[-1].best:
            notes.append(
                f"the last {done[-1].best} steps were fitted to all {everything.size} images: what is said of those "
                "held back is from before"
            )
    after = Fidelities(measure(original.images), after_held_back)
    return Recovered(student, before, after, fold_error, tuple(notes), tuple(done))


def _kept(
    comparison: Comparison, sets: Sequence[CalibrationSet], device: str, budget: int
) -> list[CalibrationSet] | None:
    """The values that both networks share for each of some sets of images; None where they cannot all be kept."""
    # a quarter for each: the fitted and the held-back ones are there by themselves, and joined for the last steps; the
    # fourth is for what the original answers to those that judge
    kept = [comparison.keep(images, device, budget // 4) for images in sets]
    found = [one for one in kept if one is not None]
    return found if len(found) == len(sets) else None


def _next_smaller(settings: FitSettings, rate: float) -> float:
    """The largest of the rates below one, or that one where it is the smallest."""
    return max((other for other in settings.rates if other < rate), default=rate)


def _norms_that_stay(part: fx.GraphModule, settings: FitSettings) -> list[str]:
    """What the user should know about batch norms that cannot follow the settings."""
    fixed = fixed_norms(part) if settings.batch_norm != "eval" else []
    if not fixed:
        return []
    return [
        "batch norms that no module holds kept their running statistics while the network mimicked, which costs "
        f"accuracy: {shortened(fixed)}"
    ]
