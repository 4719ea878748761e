"""The criteria that PRACTISE compares itself with in its table 8: they judge the cut as it is, without recovery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.extract import share
from fxprune.graph.regions import Region
from fxprune.options import Criterion
from fxprune.passes import DropRegions
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap

__all__ = ["BareScorer"]


class BareScorer:
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

    tensor: Tensor = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return tensor.float()
