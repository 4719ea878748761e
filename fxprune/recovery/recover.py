"""From a chosen set of regions to a recovered network: cut, fold the adaptors, mimic."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fxprune.calibration.batches import CalibrationSet
from fxprune.errors import CalibrationError
from fxprune.graph.regions import AdaptorSite, Region
from fxprune.options import FitSettings
from fxprune.passes import Cut, FoldAdaptors
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.recovery.fidelity import Fidelities, fidelities
from fxprune.recovery.original import Original
from fxprune.recovery.training import adaptable_norms, fit_features, fixed_norms, trainable_parameters

__all__ = ["Recovered", "cut_and_fold", "recover"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """A compressed network and what recovery measured on the way.

    Attributes:
        graph: The network, sharing nothing with the original.
        before: How near it was to the original before mimicking: cut, adaptors folded.
        after: The same after it.
        fold_error: See `CompressionReport`.
        notes: What the user should know.
    """

    graph: fx.GraphModule
    before: Fidelities
    after: Fidelities
    fold_error: float | None
    notes: tuple[str, ...] = ()

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
    progress: bool = False,
) -> Recovered:
    """Cuts a set of regions and repairs the rest by mimicking the original (MiR; PRACTISE, eq. 4).

    Args:
        original: The network; what lies behind its tap, the classifier, stays as it is.
        regions: What to drop.
        maps: Fitted adaptors to fold in first; empty for PRACTISE, which mimics from the bare cut.
        settings: Of the mimicking.
        held_back: Images to measure on beside those of the original; nothing is fitted to them.
        progress: Whether to draw a progress bar.
    """
    student, fold_error = cut_and_fold(original, regions, maps)
    images, device = original.images, original.device
    teacher = FeatureReader(original.graph, original.tap, fold=True)
    reader = FeatureReader(student, surviving_tap(original.tap, regions))
    before = fidelities(original, student, regions, held_back)
    parameters = trainable_parameters(reader.part, student)
    if not parameters or not settings.iterations:
        return Recovered(student, before, before, fold_error)

    def fit(settings: FitSettings) -> float:
        fit_features(teacher, reader, parameters, original, settings, progress=progress, shared=True)
        return mean_feature_loss(teacher, reader, images, device=device)

    settings, notes = _suited_to(reader.part, settings)
    undone = _fit_or_undo(student, fit, settings, before.fitted.feature_error)
    for note in (*notes, *undone):
        logger.warning("%s", note)
    after = fidelities(original, student, regions, held_back)
    return Recovered(student, before, after, fold_error, (*notes, *undone))


def _suited_to(part: fx.GraphModule, settings: FitSettings) -> tuple[FitSettings, list[str]]:
    """The settings that suit a network's batch norms, and what the user should know about them."""
    notes: list[str] = []
    fixed = fixed_norms(part)
    if settings.batch_norm == "train" and fixed:
        notes.append(f"batch norms of the exported graph stayed in evaluation mode: {', '.join(fixed)}")
    normalised = settings.batch_norm == "train" and adaptable_norms(part)
    if settings.unnormalised_rate is not None and not normalised:
        settings = replace(settings, learning_rate=settings.unnormalised_rate)
    return settings, notes


def _fit_or_undo(
    student: nn.Module, fit: Callable[[FitSettings], float], settings: FitSettings, before: float
) -> list[str]:
    """Fits, and goes back to the start where that raised the error; returns notes."""
    start = copy.deepcopy(student.state_dict())  # quantised modules keep more than tensors in it
    notes: list[str] = []
    for left in range(settings.retries, -1, -1):
        try:
            after = fit(settings)
        except CalibrationError:  # the loss left the finite numbers
            if not left:
                raise
            after = float("inf")
        if after < before:
            return notes
        notes.append(
            f"mimicking at a learning rate of {settings.learning_rate:g} raised the feature error from {before:.4g} to "
            f"{after:.4g}, so it was undone"
        )
        student.load_state_dict(start)
        settings = replace(settings, learning_rate=settings.learning_rate / 10)
    return notes
