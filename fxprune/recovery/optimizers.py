"""Optimisers with steps that suit the weights they change: relative to their size, or to their width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.recipes import FitSettings

__all__ = ["optimizer_for"]

NARROWEST = 16
"""Weights with fewer inputs count as having so many where the rate depends on the width: their fits overshot."""


def optimizer_for(parameters: Sequence[nn.Parameter], settings: FitSettings) -> torch.optim.Optimizer:
    """The optimiser that some settings name; its groups have the rates of the first step after warming up.

    With `width-adam` a rate is divided by the number of inputs of its weight, counted along the last dimension (Tensor
    Programs V, table 3): a step of Adam moves every entry of a `[C, C]` adaptor by about the rate, and so its output by
    up to C times that.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "relative-adam":
        return _RelativeAdam(parameters, lr=rate, weight_decay=decay)
    by_width = settings.optimizer == "width-adam"
    groups = [
        {"params": [p], "lr": rate / max(NARROWEST, p.shape[-1]) if by_width else rate} for p in parameters
    ]
    return torch.optim.Adam(groups, weight_decay=decay)


def _size(weight: Tensor) -> Tensor:
    """Root mean square of each output channel (dimension 0), or of a whole vector."""
    if weight.dim() < 2:
        return weight.square().mean().sqrt().clamp_min(1e-3)
    axes = tuple(range(1, weight.dim()))
    return weight.square().mean(dim=axes, keepdim=True).sqrt().clamp_min(1e-6)


class _RelativeAdam(torch.optim.Adam):
    """Adam whose learning rate is a share of the weights' size when training began.

    Plain Adam moves every weight by about the learning rate. Once batch norm is folded away, the channels of one
    layer differ in size by orders of magnitude, and a step that is small for one of them destroys another.

    Args:
        parameters: What to train.
        lr: Relative step; 0.01 changes a channel's weights by about a hundredth of their root mean square.
        weight_decay: As in `torch.optim.Adam`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self._trained = [p for group in self.param_groups for p in group["params"]]
        self._sizes = [_size(p.detach()) for p in self._trained]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Adam, scaled channel by channel."""
        before = [p.clone() for p in self._trained]
        result = super().step(closure)
        for parameter, old, size in zip(self._trained, before, self._sizes, strict=True):
            parameter.sub_(old).mul_(size).add_(old)
        return result
