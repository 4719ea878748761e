"""Optimisers with steps that suit the weights they change: relative to their size, or to their width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.recipes import FitSettings

__all__ = ["optimizer_for"]

MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
"""Muon's, as published."""

LARGE = 128
"""Rows from which a multiplication costs more than its call does."""

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
    if settings.optimizer == "relative-muon":
        return _RelativeMuon(parameters, lr=rate, weight_decay=decay)
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


class _RelativeMuon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) on matrices, in steps that are relative to each output channel; Adam on the rest.

    Muon moves a matrix along all of its directions alike: its step is the momentum with all singular values made 1.
    Here it steps on the weights divided by the size that their channels had when training began, and its step's root
    mean square is the learning rate, so that the rate means what it does to `_RelativeAdam`, which trains what is no
    matrix: vectors, and the weights of depthwise convolutions. `torch.optim.Muon` takes matrices only, and computes in
    bfloat16, which many processors do not have.

    Args:
        parameters: What to train.
        lr: Relative step, as in `_RelativeAdam`.
        weight_decay: L2 penalty, coupled.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        trained = [p for group in self.param_groups for p in group["params"]]
        self._sizes = {p: _size(p.detach()) for p in trained if _is_matrix(p)}
        rest = [p for p in trained if p not in self._sizes]
        self._rest = _RelativeAdam(rest, lr=lr, weight_decay=weight_decay) if rest else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Muon on each matrix, and one of Adam."""
        loss = None if closure is None else closure()
        (group,) = self.param_groups
        for parameter in self._sizes:
            if parameter.grad is not None:
                self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])
        if self._rest is not None:
            self._rest.param_groups[0]["lr"] = group["lr"]
            self._rest.step()
        return loss

    def _move(self, weight: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        size, state = self._sizes[weight], self.state[weight]
        slope = (gradient.add(weight, alpha=decay) * size).flatten(1)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(slope)
        momentum = state["momentum"].mul_(MOMENTUM).add_(slope)
        direction = _orthogonalised(slope.add(momentum, alpha=MOMENTUM))  # Nesterov's
        # the entries of a matrix whose singular values are 1 are smaller by the root of its larger side
        scale = max(direction.shape) ** 0.5
        weight.sub_(direction.view_as(weight) * size, alpha=rate * scale)


def _is_matrix(weight: Tensor) -> bool:
    """Whether a weight mixes channels: not a vector, and not that of a depthwise convolution."""
    return weight.dim() >= 2 and min(weight.shape[:2]) > 1


def _orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix with orthogonal rows or columns, by a quintic Newton-Schulz iteration.

    The coefficients are those of Muon: singular values come out between about 0.7 and 1.2. In float32 at least.
    """
    transposed = matrix.shape[0] > matrix.shape[1]
    wide: Tensor = (matrix.t() if transposed else matrix).to(torch.promote_types(matrix.dtype, torch.float32))
    wide = wide / wide.norm().clamp_min(torch.finfo(wide.dtype).tiny)
    if wide.shape[0] < LARGE or wide.shape[1] < 3 * wide.shape[0]:
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = wide @ wide.t()
            wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    else:
        # each step multiplies from the left by a polynomial of one Gram matrix: collect these, which are small
        gram, eye = wide @ wide.t(), torch.eye(len(wide)).to(wide)
        product = eye
        for _ in range(NEWTON_SCHULZ_STEPS):
            step = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
            product, gram = step @ product, step @ gram @ step
        wide = product @ wide
    return (wide.t() if transposed else wide).to(matrix.dtype)
