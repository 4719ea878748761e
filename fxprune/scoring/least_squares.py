"""PRE adaptors in closed form: the linear map that best turns what an operator now reads into what it used to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.regions import Side
from fxprune.passes import Adaptor

__all__ = ["solve_map", "start_pre_adaptors"]


def _rows(values: Tensor, channel_dim: int) -> Tensor:
    """`[positions, channels]`, in float64 sums' order."""
    moved = values.movedim(channel_dim, -1) if channel_dim != -1 else values
    return moved.reshape(-1, moved.shape[-1])


def solve_map(source: Tensor, target: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """Least squares towards the identity: `min_A |source A^T - target|^2 + ridge s |A - I|^2`.

    Args:
        source: `[positions, channels]`.
        target: The same shape.
        ridge: Strength relative to `s`, the mean energy of a source channel.

    Returns:
        `A`, `[channels, channels]`, float64.
    """
    gram = (source.T @ source).double()
    cross = (target.T @ source).double()
    scale = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(gram + scale * eye, cross + scale * eye, left=False)
    return solution


class _Starter(fx.Interpreter):
    """Runs a candidate's suffix once and sets each PRE adaptor before its value goes on."""

    def __init__(self, part: fx.GraphModule, targets: Mapping[str, Tensor]) -> None:
        super().__init__(part)
        self._targets = targets

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if (
            isinstance(module, Adaptor)
            and module.site.side is Side.PRE
            and module.site.operator in self._targets
        ):
            wanted = self._targets[module.site.operator]
            dim = module.site.channel_dim
            if wanted.shape == args[0].shape:
                module.weight.copy_(solve_map(_rows(args[0], dim), _rows(wanted, dim)))
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def start_pre_adaptors(part: fx.GraphModule, inputs: list[Tensor], targets: Mapping[str, Tensor]) -> None:
    """Sets every PRE adaptor of a part by least squares, in one walk.

    Args:
        part: A candidate from its frontier to the tap.
        inputs: Values of its placeholders for some images; in-place operators may change them.
        targets: What each operator read in the original network, for the same images, by operator name.
    """
    _Starter(part, targets).run(*inputs)
