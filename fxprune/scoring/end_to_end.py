"""The published scorer (PRACTISE, section 3.2): adaptors trained through the whole network."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.graph.regions import Region
from fxprune.options import FitSettings
from fxprune.recovery.adaptors import AdaptorFit, Candidate, adaptor_weights
from fxprune.recovery.comparison import compare_whole
from fxprune.recovery.original import Original
from fxprune.recovery.training import fit_features
from fxprune.scoring.scorer import SingleScorer

__all__ = ["EndToEndScorer"]


class EndToEndScorer(SingleScorer):
    """Trains every candidate forward and back through the whole network at every step: the paper has no shortcut.

    Args:
        original: The network.
        settings: Of the fit.
        progress: Whether to draw a bar for each candidate.
    """

    def __init__(self, original: Original, settings: FitSettings, *, progress: bool = False) -> None:
        self._original, self._settings, self._progress = original, settings, progress

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Trains the adaptors of one set, from the identity in any case."""
        one = self._original
        candidate = Candidate(one.graph, regions, one.tap)
        compared = compare_whole(one, candidate.graph, candidate.tap)
        before = compared.error(one.images, one.device)
        parameters = adaptor_weights(compared.student)
        if parameters and self._settings.iterations:
            title = ", ".join(region.label for region in regions)
            fit_features(compared, parameters, one, self._settings, progress=self._progress, title=title)
        after = compared.error(one.images, one.device)
        return AdaptorFit(candidate.maps(), after, before)
