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
from fxprune.graph.operators import MUTATES

__all__ = ["bind", "has_shapes", "propagate_shapes"]


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


def _parts(spec: Any) -> Sequence[Any]:
    """The children of a `TreeSpec`; before torch 2.10 they were an attribute."""
    parts: Sequence[Any] = spec.children() if hasattr(spec, "children") else spec.children_specs
    return parts


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
        keywords = _parts(info.in_spec)[1].context or []
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
    unknown = set(kwargs) - {str(node.target) for node in placeholders}
    if len(args) > len(placeholders) or unknown:
        names = [str(node.target) for node in placeholders]
        raise GraphError(
            f"the network takes {names}, but {len(args)} positional and {sorted(kwargs)} were given"
        )
    return values


def has_shapes(gm: fx.GraphModule) -> bool:
    """Whether every node that computes something carries `tensor_meta`."""
    return all("tensor_meta" in node.meta for node in gm.graph.nodes)


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
        try:
            copies = pytree.tree_map_only(torch.Tensor, torch.clone, values)
            with torch.no_grad():
                _Recorder(gm).run(*copies, enable_io_processing=False)
        except Exception as error:
            shapes = [tuple(v.shape) for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]
            message = (
                f"the network does not run on example inputs of shape {shapes}: {error}; give inputs of the shape, "
                "type and device that the network takes"
            )
            raise GraphError(message) from fake_error
