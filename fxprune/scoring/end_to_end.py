"""The published scorer (PRACTISE, section 3.2): adaptors trained through the whole network."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxprune.graph.regions import Region
from fxprune.options import FitSettings
from fxprune.recovery.adaptors import AdaptorFit, Candidate, adaptor_weights
from fxprune.recovery.features import FeatureReader, mean_feature_loss
from fxprune.recovery.original import Original
from fxprune.recovery.training import fit_features

__all__ = ["EndToEndScorer"]


class EndToEndScorer:
    """Trains every candidate forward and back through the whole network at every step.

    Args:
        original: The network.
        settings: Of the fit.
        progress: Whether to draw a bar for each candidate.
    """

    continues = False
    workers = 1

    def __init__(self, original: Original, settings: FitSettings, *, progress: bool = False) -> None:
        self._original, self._settings, self._progress = original, settings, progress

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Nothing is shared."""

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Trains the adaptors of one set, from the identity in any case."""
        one = self._original
        candidate = Candidate(one.graph, regions, one.tap)
        teacher, student = FeatureReader(one.graph, one.tap), FeatureReader(candidate.graph, candidate.tap)
        before = mean_feature_loss(teacher, student, one.images, device=one.device)
        parameters = adaptor_weights(student.part)
        if parameters and self._settings.iterations:
            title = ", ".join(region.label for region in regions)
            fit_features(
                teacher, student, parameters, one, self._settings, progress=self._progress, title=title
            )
        with torch.no_grad():
            after = mean_feature_loss(teacher, student, one.images, device=one.device)
        return AdaptorFit(candidate.maps(), after, before)

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """As `fit`: the paper has no shortcut."""
        return self.fit(regions).loss

    def release(self) -> None:
        """Nothing is held."""
