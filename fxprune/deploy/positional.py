"""Networks with nested or keyword inputs, made callable with a flat list of tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.recovery.inputs import Inputs

__all__ = ["Positional", "flat_tensors", "positional"]


def flat_tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of a batch, in the order that `Positional` takes them."""
    return tuple(
        leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, Tensor)
    )


class Positional(nn.Module):
    """Calls a network with the tensors in their places.

    Args:
        network: The network.
        inputs: A batch of the structure that the network takes.
    """

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network = network
        self._leaves, self._spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        self.training = network.training

    def forward(self, *tensors: Tensor) -> Any:
        """The network's output."""
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.network(*args, **kwargs)


def positional(network: nn.Module, inputs: Inputs) -> nn.Module:
    """The network itself where it takes nothing but positional tensors, else a `Positional`."""
    plain = not inputs.kwargs and all(isinstance(arg, Tensor) for arg in inputs.args)
    return network if plain else Positional(network, inputs)
