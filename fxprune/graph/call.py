"""One call of a network: its arguments, as people give them, as the graph takes them, and as a flat list of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import GraphError

__all__ = ["Calls", "Inputs", "Positional", "bind", "flat_tensors", "input_names", "is_batched", "positional"]


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


def is_batched(leaf: object) -> bool:
    """Whether a leaf is a tensor with a batch dimension."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0


@dataclass(frozen=True, eq=False)
class Inputs:
    """One batch, as given to `model(*args, **kwargs)`.

    Leaves are found through nested tuples, lists and dicts. Tensors have the batch in dimension 0; scalars
    and whatever is no tensor belong to every image alike and pass through all methods.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> tuple[Any, ...] | dict[str, Any]:
        """The arguments as tracing and exporting take them: all by position or all by name.

        Raises:
            GraphError: Some are given by position, others by name.
        """
        if self.args and self.kwargs:
            raise GraphError(
                f"{len(self.args)} inputs are given by position and {', '.join(self.kwargs)} by name; give all one way"
            )
        return self.kwargs or self.args

    @property
    def calls(self) -> tuple[Inputs, ...]:
        """The calls that this is: one."""
        return (self,)

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return int(self.tensors()[0].shape[0])

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that have a batch dimension, in argument order."""
        return tuple(leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if is_batched(leaf))

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """A copy with `function` applied to each of `tensors()`."""
        args, kwargs = pytree.tree_map_only(is_batched, function, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def to(self, device: torch.device | str) -> Inputs:
        """The batch on `device`; scalar tensors move too."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def select(self, indices: Tensor) -> Inputs:
        """The images at `indices` (int64, one-dimensional), in that order."""
        return self.map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))


class Calls(Inputs):
    """A batch for several networks side by side: each argument is all that one of them is given, a tuple or a dict."""

    @classmethod
    def of(cls, calls: Iterable[Inputs]) -> Calls:
        """The batch of some calls."""
        return cls(tuple(call.given for call in calls))

    @property
    def calls(self) -> tuple[Inputs, ...]:
        """What each network is called with."""
        return tuple(Inputs((), dict(one)) if isinstance(one, Mapping) else Inputs(one) for one in self.args)


def input_names(model: Any) -> dict[str, bool]:
    """The network's inputs by name, and whether each is required; none of an exported program."""
    if isinstance(model, fx.GraphModule):
        inputs = model.graph.find_nodes(op="placeholder")
        return {str(n.target): not n.args for n in inputs if not str(n.target).startswith("*")}
    if not isinstance(model, nn.Module):
        return {}
    parameters = inspect.signature(model.forward).parameters.values()
    return {
        p.name: p.default is p.empty for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def bind(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Orders call arguments as the graph's placeholders.

    Args:
        gm: The graph; its calling convention may flatten nested inputs.
        args: Positional arguments of `gm(*args, **kwargs)`.
        kwargs: Keyword arguments.

    Returns:
        One value for each placeholder that was given one.

    Raises:
        GraphError: An argument has no placeholder, or a placeholder without default got none.
    """
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None and info.in_spec.num_children == 2 and info.in_spec.type is tuple:
        spec = info.in_spec  # before torch 2.10 its children were an attribute
        keywords = (spec.children() if hasattr(spec, "children") else spec.children_specs)[1].context or []
        ordered = {name: kwargs[name] for name in keywords if name in kwargs}
        return pytree.tree_leaves((tuple(args), ordered))
    if info is not None:
        return pytree.tree_leaves(tuple(args))
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = list(args)
    for node in placeholders[len(values) :]:
        name = str(node.target)
        if name in kwargs:
            values.append(kwargs[name])
        elif node.args:
            values.append(node.args[0])
        elif not name.startswith("*"):
            raise GraphError(f"input {name!r} of the network was not given", nodes=[node.name])
    names = [str(node.target) for node in placeholders]
    if len(args) > len(placeholders) or not kwargs.keys() <= set(names):
        raise GraphError(
            f"the network takes {names}, but {len(args)} positional and {sorted(kwargs)} were given"
        )
    return values
