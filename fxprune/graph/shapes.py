"""Shapes and types on every node, without running the network's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxprune.errors import GraphError
from fxprune.graph.call import bind
from fxprune.graph.operators import MUTATES

__all__ = ["propagate_shapes", "unfit"]


def _metadata(value: Any) -> Any:
    """`TensorMetadata` of every tensor in `value`, its structure kept; None when there is no tensor."""
    leaves, spec = pytree.tree_flatten(value)
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return None
    described = [
        TensorMetadata(leaf.shape, leaf.dtype, leaf.requires_grad, (), None, False, {})
        if isinstance(leaf, torch.Tensor)
        else None
        for leaf in leaves
    ]
    return described[0] if spec.is_leaf() else tuple(described)


class _Recorder(fx.Interpreter):
    """Runs a graph and notes what each node yields, and which of its inputs it changes and returns.

    A function that tracing took for a leaf may do so whatever it is called; torch counts the changes of every tensor.
    """

    def run_node(self, n: fx.Node) -> Any:
        given = [self.env[source] for source in n.all_input_nodes]
        before = [_version(value) for value in given]
        value = super().run_node(n)
        n.meta["tensor_meta"] = _metadata(value)
        n.meta.pop(MUTATES, None)
        for index, (one, version) in enumerate(zip(given, before, strict=True)):
            if one is value and _version(one) != version:
                n.meta[MUTATES] = index
        return value


def _version(value: Any) -> int | None:
    """How often a tensor was changed in place; None for other values, and for tensors that do not count."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def propagate_shapes(
    gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> None:
    """Sets `node.meta["tensor_meta"]` on every node, and notes changes in place, by running the graph on fake tensors.

    Operators that cannot run on fake tensors make it run once for real, on copies of the inputs.

    Args:
        gm: The graph; only its metadata changes.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Raises:
        GraphError: The network does not run on these inputs.
    """
    values = bind(gm, args, kwargs or {})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        fakes = pytree.tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), values)
        with mode, torch.no_grad():
            _Recorder(gm).run(*fakes, enable_io_processing=False)
    except Exception as fake_error:
        copies = pytree.tree_map_only(torch.Tensor, torch.clone, values)
        try:
            with torch.no_grad():
                _Recorder(gm).run(*copies, enable_io_processing=False)
        except Exception as error:
            raise unfit(values, error) from fake_error


def unfit(inputs: Any, error: Exception) -> GraphError:
    """The error for inputs that a network does not run on."""
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return GraphError(
        f"the network does not run on example inputs of shape {shapes}: {error}; give inputs of the shape, type and "
        "device that the network takes"
    )
