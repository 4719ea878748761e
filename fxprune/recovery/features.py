"""Features at the tap, and how far two networks' lie apart (PRACTISE, eq. 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.call import Inputs, bind
from fxprune.graph.extract import between
from fxprune.graph.regions import Region, every_call
from fxprune.passes import FoldBatchNorm

__all__ = [
    "FeatureReader",
    "copied",
    "exit_of",
    "feature_loss",
    "mean_error",
    "mean_feature_loss",
    "relative_loss",
    "surviving_tap",
]

_LEAST = torch.finfo(torch.float32).tiny


def surviving_tap(tap: Sequence[str], regions: Sequence[Region]) -> tuple[str, ...]:
    """The nodes that hold the tap's values once some regions are dropped."""
    bypass = {region.exit: region.bypass for region in every_call(regions)}

    def follow(name: str) -> str:
        while name in bypass:
            name = bypass[name]
        return name

    return tuple(follow(name) for name in tap)


def exit_of(regions: Sequence[Region], name: str) -> str:
    """The node whose value in the original a node has to take over once some regions are dropped: itself, mostly."""
    exits = {region.bypass: region.exit for region in every_call(regions)}
    while name in exits:
        name = exits[name]
    return name


class FeatureReader:
    """Runs a network up to its tap.

    Args:
        gm: The network; the reader shares its modules.
        tap: Nodes whose values are the features.
        fold: Whether the reader has its batch norms folded, which spares a network that only answers a fifth of its
            time; the network itself stays as it is.
        copies: Whether the features are copied when they come, so that no later in-place operator changes them.
    """

    def __init__(
        self, gm: fx.GraphModule, tap: Sequence[str], *, fold: bool = False, copies: bool = False
    ) -> None:
        self._gm = gm
        self._placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        self.part = between(gm, self._placeholders, list(tap))
        if fold:
            FoldBatchNorm()(self.part)
        if copies:
            _copy_outputs(self.part)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Features of a batch, one tensor for each node of the tap."""
        values = bind(self._gm, inputs.args, inputs.kwargs)
        features: tuple[Tensor, ...] = self.part(*values)
        return features


def copied(value: Any) -> Any:
    """The same value with all its tensors copied; numbers among the inputs stay what they are."""
    return pytree.tree_map_only(Tensor, torch.clone, value)


def _copy_outputs(part: fx.GraphModule) -> None:
    """Lets a part return copies of its outputs, made before anything else reads them."""
    end = part.graph.output_node()
    copies: dict[fx.Node, fx.Node] = {}
    for node in end.all_input_nodes:
        with part.graph.inserting_after(node):
            copies[node] = part.graph.call_function(copied, (node,))
    end.args = fx.node.map_arg(end.args, copies.__getitem__)
    part.recompile()


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error over all elements of all features, in float32 or wider."""
    errors = [nn.functional.mse_loss(s, t, reduction="sum") for s, t in zip(student, teacher, strict=True)]
    return torch.stack(errors).sum() / sum(t.numel() for t in teacher)


def relative_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean of the features' squared errors, each relative to the variance of the teacher's."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([nn.functional.mse_loss(s, t) / t.var().clamp_min(_LEAST) for s, t in pairs]).mean()


def mean_feature_loss(
    teacher: FeatureReader,
    student: FeatureReader,
    calibration: CalibrationSet,
    *,
    device: str,
    batch_size: int = 64,
) -> float:
    """`feature_loss` over all calibration images, without augmentation."""
    return mean_error(lambda inputs: (student(inputs), teacher(inputs)), calibration, device, batch_size)


@torch.no_grad()
def mean_error(
    features: Callable[[Inputs], tuple[Sequence[Tensor], Sequence[Tensor]]],
    calibration: CalibrationSet,
    device: str,
    batch_size: int = 64,
) -> float:
    """`feature_loss` of two networks' features, which a function gives for a batch, over all calibration images."""
    total, elements = 0.0, 0
    for batch in calibration.batches(batch_size):
        got, wanted = features(batch.to(device))
        count = sum(t.numel() for t in wanted)
        total += float(feature_loss(got, wanted)) * count
        elements += count
    return total / elements
