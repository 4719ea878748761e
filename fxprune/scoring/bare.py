"""Criteria that judge the cut as it is, without recovery: those that PRACTISE compares itself with, and users' own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.errors import OptionError
from fxprune.graph.extract import share
from fxprune.graph.regions import Region
from fxprune.options import Criterion, Loss
from fxprune.passes import DropRegions
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.recovery.original import Original
from fxprune.scoring.scorer import SingleScorer

__all__ = ["BareScorer"]


class BareScorer(SingleScorer):
    """Criteria that look at the bare cut.

    Args:
        original: The network.
        criterion: `l2` at the tap (as in eps-ResNet), `kl` of the outputs (CURL; PRACTISE, table 8), or a function of
            the outputs, see `fxprune.options.Options`.
    """

    def __init__(self, original: Original, criterion: Criterion | Loss) -> None:
        self._original, self._criterion = original, criterion

    @torch.no_grad()
    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Measures the bare cut; there are no adaptors.

        Raises:
            OptionError: The criterion is a function, and fails or returns no finite number.
        """
        one = self._original
        student = share(one.graph)
        DropRegions(regions)(student)
        if self._criterion == "l2":
            teacher = FeatureReader(one.graph, one.tap)
            reader = FeatureReader(student, surviving_tap(one.tap, regions))
            loss = mean_feature_loss(teacher, reader, one.images, device=one.device)
        else:
            loss = self._mean(student, self._criterion if callable(self._criterion) else _divergence)
        return AdaptorFit({}, loss, loss)

    def _mean(self, student: fx.GraphModule, criterion: Loss) -> float:
        """The mean over all images of what a function says of the outputs."""
        total = 0.0
        for batch in self._original.images.batches(64):
            inputs = batch.to(self._original.device)
            found, wanted = (
                graph(*inputs.args, **inputs.kwargs) for graph in (student, self._original.graph)
            )
            total += _number(criterion, found, wanted) * batch.batch_size
        return total / self._original.images.size


def _number(criterion: Loss, found: Any, wanted: Any) -> float:
    name = getattr(criterion, "__qualname__", type(criterion).__name__)
    try:
        value = float(criterion(found, wanted))
    except Exception as error:
        raise OptionError(
            f"criterion {name} failed on the outputs of a batch: {type(error).__name__}: {error}; it is called with "
            "what the network without some regions and the original give, and returns a number"
        ) from error
    if not math.isfinite(value):
        raise OptionError(f"criterion {name} returned {value}; it must be a finite number")
    return value


def _divergence(found: Any, wanted: Any) -> Tensor:
    """The Kullback-Leibler divergence of the outputs as classes, of one position of one image."""
    ours, theirs = (F.log_softmax(_logits(output), -1) for output in (found, wanted))
    positions = ours.numel() // ours.shape[-1]  # 1 an image for a classifier
    return F.kl_div(ours, theirs, log_target=True, reduction="sum") / positions


def _logits(output: object) -> Tensor:
    tensor: Tensor = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return tensor.float()
