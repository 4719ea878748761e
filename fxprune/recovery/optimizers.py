"""Adam with steps that suit the weights they change: relative to their size, or to their width."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RelativeAdam", "WidthAdam"]


def _size(weight: Tensor) -> Tensor:
    """Root mean square of each output channel (dimension 0), or of a whole vector."""
    if weight.dim() < 2:
        return weight.square().mean().sqrt().clamp_min(1e-3)
    axes = tuple(range(1, weight.dim()))
    return weight.square().mean(dim=axes, keepdim=True).sqrt().clamp_min(1e-6)


class RelativeAdam(torch.optim.Adam):
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


class WidthAdam(torch.optim.Adam):
    """Adam whose rate is divided by the number of inputs of each weight (Tensor Programs V, table 3).

    A step of Adam moves every entry of a `[C, C]` adaptor by about the rate, and so its output by up to C times that.
    Weights with fewer than `NARROWEST` inputs count as having so many: their fits overshot.

    Args:
        parameters: What to train; inputs are counted along the last dimension.
        lr: Rate times the number of inputs.
        weight_decay: As in `torch.optim.Adam`.
    """

    NARROWEST = 16

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__([{"params": [p]} for p in parameters], lr=lr, weight_decay=weight_decay)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Adam, each weight at its own rate."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] /= max(self.NARROWEST, group["params"][0].shape[-1])
        result = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return result
