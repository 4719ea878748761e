"""How hard a cut is: PRACTISE's recovery loss, and the criteria it is compared with in its table 8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.graph.extract import share
from fxprune.graph.regions import Region
from fxprune.options import Criterion, Recipe
from fxprune.passes import DropRegions
from fxprune.recovery.adaptors import AdaptorFit, fit_end_to_end
from fxprune.recovery.cached import CachedScorer
from fxprune.recovery.calibration import CalibrationSet
from fxprune.recovery.mimic import FeatureReader, mean_feature_loss, surviving_tap

__all__ = ["EndToEndScorer", "Scorer", "make_scorer"]


class Scorer(Protocol):
    """Anything that can tell what dropping a set of regions costs."""

    @property
    def continues(self) -> bool:
        """Whether fits of a set's parts serve as a start; where not, they are ignored."""

    @property
    def workers(self) -> int:
        """How many sets may be fitted or estimated at once, from several threads."""

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Announces the sets to come, so that work can be shared."""

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Fits adaptors for one set and measures the loss, starting from fits of disjoint parts of it, if given."""

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """The loss of one set, as exactly as comparing many sets needs."""

    def release(self) -> None:
        """Gives memory back; what a later call needs of it is computed anew."""


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


class _BareScorer:
    """Criteria that look at the bare cut: `l2` at the tap (as in eps-ResNet), `kl` of the outputs (CURL)."""

    continues = False
    workers = 1

    def __init__(
        self,
        gm: fx.GraphModule,
        tap: Sequence[str],
        calibration: CalibrationSet,
        criterion: Criterion,
        device: str,
    ) -> None:
        self._gm, self._tap, self._calibration = gm, tap, calibration
        self._criterion, self._device = criterion, device

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Nothing is shared."""

    @torch.no_grad()
    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Measures the bare cut; there are no adaptors."""
        student = share(self._gm)
        DropRegions(regions)(student)
        if self._criterion == "l2":
            readers = (
                FeatureReader(self._gm, self._tap),
                FeatureReader(student, surviving_tap(self._tap, regions)),
            )
            loss = mean_feature_loss(*readers, self._calibration, device=self._device)
        else:
            loss = self._divergence(student)
        return AdaptorFit({}, loss, loss)

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """As `fit`."""
        return self.fit(regions).loss

    def release(self) -> None:
        """Nothing is held."""

    def _divergence(self, student: fx.GraphModule) -> float:
        total = 0.0
        for batch in self._calibration.batches(64):
            inputs = batch.to(self._device)
            wanted, found = (_logits(g(*inputs.args, **inputs.kwargs)) for g in (self._gm, student))
            divergence = F.kl_div(
                F.log_softmax(found, -1), F.log_softmax(wanted, -1), log_target=True, reduction="none"
            )
            total += float(divergence.sum()) / divergence[0].sum(-1).numel()
        return total / self._calibration.size


def _logits(output: object) -> Tensor:
    from torch.utils import _pytree as pytree

    tensor: Tensor = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return tensor.float()


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
        return _BareScorer(gm, tap, calibration, criterion, device)
    if recipe.scorer == "cached":
        return CachedScorer(
            gm, tap, calibration, recipe.adaptor, device=device, seed=seed, cache_bytes=cache_bytes
        )
    return EndToEndScorer(gm, tap, calibration, recipe, device=device, seed=seed, progress=progress)
