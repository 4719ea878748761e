"""From a chosen set of regions to a recovered network: cut, fold the adaptors, mimic."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxprune.errors import CalibrationError
from fxprune.graph.regions import AdaptorSite, Region
from fxprune.options import FitSettings, Recipe
from fxprune.passes import Adaptor, DropRegions, FoldAdaptors, InsertAdaptors
from fxprune.recovery.calibration import CalibrationSet
from fxprune.recovery.mimic import (
    FeatureReader,
    adaptable_norms,
    fit_features,
    mean_feature_loss,
    surviving_tap,
    trainable_parameters,
)

__all__ = ["Recovered", "cut_and_fold", "recover"]


logger = logging.getLogger(__name__)

PROBE_STEPS = 8
"""Steps that each learning rate of a probe is tried for."""

PROBE_IMAGES = 64
"""Images that a probe's error is taken over, at most."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """A compressed network and what recovery measured on the way.

    Attributes:
        graph: The network, sharing nothing with the original.
        loss_before: Mean squared error at the tap before mimicking.
        loss_after: The same after it.
        fold_error: See `CompressionReport`.
        notes: What the user should know.
    """

    graph: fx.GraphModule
    loss_before: float
    loss_after: float
    fold_error: float | None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def cut_and_fold(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    maps: Mapping[AdaptorSite, Tensor],
    tap: Sequence[str],
    calibration: CalibrationSet,
    *,
    device: str,
) -> tuple[fx.GraphModule, float | None]:
    """A copy of a network without some regions, with fitted adaptors folded in.

    Args:
        gm: The original; copied.
        regions: What to drop.
        maps: Adaptors by site; sites without a map get none.
        tap: Where the fold is checked.
        calibration: Images to check it on.
        device: Where `gm` is.

    Returns:
        The copy, and the fold error: the largest difference of the features between adaptors in place and folded,
        relative to the largest feature; None when there are no maps.
    """
    student = copy.deepcopy(gm)
    DropRegions(regions)(student)
    if not maps:
        return student, None
    InsertAdaptors(list(maps))(student)
    for module in student.modules():
        if isinstance(module, Adaptor):
            module.weight.copy_(maps[module.site])
            module.weight.requires_grad_(False)
    survivors = surviving_tap(tap, regions)
    example = calibration.example(8).to(device)
    inserted = FeatureReader(student, survivors)(example)
    FoldAdaptors()(student)
    folded = FeatureReader(student, survivors)(example)
    largest = max(float(t.abs().max()) for t in inserted)
    error = max(float((a - b).abs().max()) for a, b in zip(inserted, folded, strict=True))
    return student, error / max(largest, torch.finfo(torch.float32).tiny)


def recover(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    maps: Mapping[AdaptorSite, Tensor],
    tap: Sequence[str],
    calibration: CalibrationSet,
    recipe: Recipe,
    *,
    device: str,
    seed: int,
    progress: bool = False,
) -> Recovered:
    """Cuts a set of regions and repairs the rest by mimicking the original (MiR; PRACTISE, eq. 4).

    Args:
        gm: The original, frozen.
        regions: What to drop.
        maps: Fitted adaptors to fold in first; empty for PRACTISE, which mimics from the bare cut.
        tap: Where features are compared; what lies behind it, the classifier, stays as it is.
        calibration: The images.
        recipe: Its `mimic` settings are used.
        device: Where `gm` is.
        seed: Of order and augmentation.
        progress: Whether to draw a progress bar.
    """
    student, fold_error = cut_and_fold(gm, regions, maps, tap, calibration, device=device)
    teacher_reader = FeatureReader(gm, tap)
    student_reader = FeatureReader(student, surviving_tap(tap, regions))
    before = mean_feature_loss(teacher_reader, student_reader, calibration, device=device)
    after = before
    notes: list[str] = []
    parameters = trainable_parameters(student_reader.part)
    if parameters and recipe.mimic.iterations:

        def fit(settings: FitSettings, bars: bool) -> None:
            fit_features(
                teacher_reader,
                student_reader,
                parameters,
                calibration,
                settings,
                device=device,
                seed=seed,
                progress=bars,
                title="mimicking",
                shared=True,
            )

        def error(images: CalibrationSet) -> float:
            return mean_feature_loss(teacher_reader, student_reader, images, device=device)

        few = CalibrationSet(calibration.example(PROBE_IMAGES))
        start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        settings = recipe.mimic
        if settings.batch_norm == "eval" or not adaptable_norms(student_reader.part):
            settings = _probed(settings, fit, lambda: error(few), lambda: student.load_state_dict(start))
        fit(settings, progress)
        after = error(calibration)
        if not after < before:
            notes.append(
                f"mimicking raised the feature error from {before:.4g} to {after:.4g}, so it was undone"
            )
            logger.warning("%s", notes[-1])
            student.load_state_dict(start)
            after = before
    return Recovered(student, before, after, fold_error, tuple(notes))


def _probed(
    settings: FitSettings,
    fit: Callable[[FitSettings, bool], None],
    error: Callable[[], float],
    reset: Callable[[], object],
) -> FitSettings:
    """The settings with the highest learning rate of `probe` that lowers the error within a few steps."""
    if not settings.probe or settings.iterations <= PROBE_STEPS:
        return settings
    before = error()
    for rate in settings.probe:
        trial = replace(settings, learning_rate=rate, iterations=PROBE_STEPS, schedule="constant")
        try:
            fit(trial, False)
            useful = error() < before
        except CalibrationError:  # the loss left the finite numbers
            useful = False
        reset()
        if useful:
            break
    else:
        logger.warning(
            "no learning rate of %s lowers the feature error in %d steps", settings.probe, PROBE_STEPS
        )
    logger.info("mimicking with a learning rate of %g", rate)
    return replace(settings, learning_rate=rate)
