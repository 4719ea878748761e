"""The criteria that PRACTISE compares itself with in its table 8: they judge the cut as it is, without recovery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.graph.extract import share
from fxprune.graph.regions import Region
from fxprune.options import Criterion
from fxprune.passes import DropRegions
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.recovery.original import Original
from fxprune.scoring.scorer import SingleScorer

__all__ = ["BareScorer"]


class BareScorer(SingleScorer):
    """Criteria that look at the bare cut: `l2` at the tap (as in eps-ResNet), `kl` of the outputs (CURL)."""

    def __init__(self, original: Original, criterion: Criterion) -> None:
        self._original, self._criterion = original, criterion

    @torch.no_grad()
    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Measures the bare cut; there are no adaptors."""
        one = self._original
        student = share(one.graph)
        DropRegions(regions)(student)
        if self._criterion == "l2":
            teacher = FeatureReader(one.graph, one.tap)
            reader = FeatureReader(student, surviving_tap(one.tap, regions))
            loss = mean_feature_loss(teacher, reader, one.images, device=one.device)
        else:
            loss = self._divergence(student)
        return AdaptorFit({}, loss, loss)

    def _divergence(self, student: fx.GraphModule) -> float:
        total = 0.0
        for batch in self._original.images.batches(64):
            inputs = batch.to(self._original.device)
            graphs = (self._original.graph, student)
            wanted, found = (_logits(graph(*inputs.args, **inputs.kwargs)) for graph in graphs)
            logs = (F.log_softmax(found, -1), F.log_softmax(wanted, -1))
            positions = found[0].numel() // found.shape[-1]  # of one image: 1 for a classifier
            total += float(F.kl_div(*logs, log_target=True, reduction="sum")) / positions
        return total / self._original.images.size


def _logits(output: object) -> Tensor:
    tensor: Tensor = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return tensor.float()
