"""The published scorer (PRACTISE, section 3.2): adaptors trained through the whole network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.regions import Region
from fxprune.options import FitSettings, Recipe
from fxprune.recovery.adaptors import AdaptorFit, Candidate, adaptor_weights
from fxprune.recovery.features import FeatureReader, mean_feature_loss
from fxprune.recovery.training import fit_features

__all__ = ["EndToEndScorer", "fit_end_to_end"]


class EndToEndScorer:
    """PRACTISE's own procedure: every candidate is trained through the whole network.

    Args:
        gm: The original, frozen, on `device`.
        tap: Where features are compared.
        calibration: The images.
        recipe: Its `adaptor` settings are used.
        device: Where to run.
        seed: Of order and augmentation.
        progress: Whether to draw a bar for each candidate.
    """

    continues = False
    workers = 1

    def __init__(
        self,
        gm: fx.GraphModule,
        tap: Sequence[str],
        calibration: CalibrationSet,
        recipe: Recipe,
        *,
        device: str,
        seed: int,
        progress: bool = False,
    ) -> None:
        self._gm, self._tap, self._calibration, self._recipe = gm, tap, calibration, recipe
        self._device, self._seed, self._progress = device, seed, progress

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Nothing is shared."""

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Trains the adaptors of one set end to end, from the identity in any case."""
        return fit_end_to_end(
            self._gm,
            regions,
            self._tap,
            self._calibration,
            self._recipe.adaptor,
            device=self._device,
            seed=self._seed,
            progress=self._progress,
        )

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """As `fit`: the paper has no shortcut."""
        return self.fit(regions).loss

    def release(self) -> None:
        """Nothing is held."""


def fit_end_to_end(
    gm: fx.GraphModule,
    regions: Sequence[Region],
    tap: Sequence[str],
    calibration: CalibrationSet,
    settings: FitSettings,
    *,
    device: str,
    seed: int,
    progress: bool = False,
) -> AdaptorFit:
    """Fits adaptors as PRACTISE does: the whole network forward and back at every step.

    Args:
        gm: The original, frozen.
        regions: What to drop.
        tap: Where features are compared.
        calibration: The images.
        settings: Of the fit.
        device: Where `gm` is.
        seed: Of order and augmentation.
        progress: Whether to draw a progress bar.

    Returns:
        The fitted maps and the losses.
    """
    candidate = Candidate(gm, regions, tap)
    teacher, student = FeatureReader(gm, tap), FeatureReader(candidate.graph, candidate.tap)
    before = mean_feature_loss(teacher, student, calibration, device=device)
    parameters = adaptor_weights(student.part)
    if parameters and settings.iterations:
        title = ", ".join(region.label for region in regions)
        fit_features(
            teacher,
            student,
            parameters,
            calibration,
            settings,
            device=device,
            seed=seed,
            progress=progress,
            title=title,
        )
    with torch.no_grad():
        after = mean_feature_loss(teacher, student, calibration, device=device)
    return AdaptorFit(candidate.maps(), after, before)
