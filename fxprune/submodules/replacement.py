"""A model with one submodule replaced by its compressed graph, everything else as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import GraphError
from fxprune.graph.call import Inputs
from fxprune.submodules.capture import device_of, submodule_of
from fxprune.tracing.evaluation import evaluation_copy
from fxprune.tracing.unwrap import inner, unwrapped

__all__ = ["forward_attributes", "put_in_place", "replace_submodule"]

_PLAIN = (bool, int, float, complex, str, type(None))
# torch.fx drops what it does not know when a graph module is copied, except what stands under this key of its meta
_PRESERVED: str = getattr(fx.graph_module, "_USER_PRESERVED_ATTRIBUTES_KEY", "_user_preserved_attributes")


def replace_submodule(
    model: nn.Module, path: str, part: fx.GraphModule, *, example: Inputs | None = None
) -> nn.Module:
    """A copy of a model in which one submodule is another.

    Plain public attributes that only the original submodule has (`backbone.out_channels`) go over to the new one, and
    parameters of the same name are frozen as they were. Forward hooks on the submodule itself do not go over.

    Args:
        model: The whole model; it is not changed.
        path: The submodule to replace, as in `model.get_submodule`.
        part: What to put there; it is copied, to where the original submodule is.
        example: Inputs of the submodule. With them both are run: mappings that tracing turned into plain dicts become
            `OrderedDict` again, and a part whose outputs are built otherwise is refused.

    Returns:
        The copy, in evaluation mode.

    Raises:
        OptionError: There is no such submodule.
        TraceError: The model cannot be copied.
        GraphError: The part's outputs differ from the original's in structure, shape or type.
    """
    model = unwrapped(model)
    original = inner(submodule_of(model, path))
    whole = evaluation_copy(model)
    placed = evaluation_copy(part).to(device_of(original, model))
    frozen = {name: p.requires_grad for name, p in original.named_parameters(remove_duplicate=False)}
    for name, parameter in placed.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(frozen.get(name, parameter.requires_grad))
    put_in_place(whole, path, placed, None if example is None else example.to(device_of(original, model)))
    return whole


def put_in_place(whole: nn.Module, path: str, part: fx.GraphModule, example: Inputs | None = None) -> None:
    """Replaces a submodule of a model in place; see `replace_submodule`, which does so to a copy."""
    original = inner(whole.get_submodule(path))
    part.meta[_PRESERVED] = {**part.meta.get(_PRESERVED, {}), **forward_attributes(original, part)}
    if example is not None:
        _restore_outputs(original, part, example, path)
    parent, _, name = path.rpartition(".")
    setattr(whole.get_submodule(parent), name, part)


def forward_attributes(original: nn.Module, part: nn.Module) -> dict[str, Any]:
    """Gives a part the plain public attributes that only the original has, and returns them."""
    missing = {
        name: copy.deepcopy(value)
        for name, value in vars(original).items()
        if not name.startswith("_") and not hasattr(part, name) and _is_plain(value)
    }
    for name, value in missing.items():
        setattr(part, name, value)
    return missing


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


@torch.no_grad()
def _restore_outputs(original: nn.Module, part: fx.GraphModule, example: Inputs, path: str) -> None:
    """Makes a part return what the original returns, not only the same tensors."""

    def run(module: nn.Module) -> Any:
        given = example.map(torch.clone)  # either may change its inputs in place
        return module(*given.args, **given.kwargs)

    wanted, found = run(original), run(part)
    if pytree.tree_structure(wanted) != pytree.tree_structure(found):
        node = next(iter(part.graph.find_nodes(op="output")))
        with part.graph.inserting_before(node):
            node.args = (_ordered(part.graph, node.args[0], wanted),)
        part.recompile()
        found = run(part)
    if _outline(wanted) != _outline(found):
        raise GraphError(
            f"the part to put at {path!r} returns {_outline(found)}, the original {_outline(wanted)}; tensors have to "
            "agree in number, shape and type"
        )


def _ordered(graph: fx.Graph, arg: Any, wanted: Any) -> Any:
    """The output's argument with a call of `OrderedDict` wherever the original returned one."""
    if isinstance(arg, dict) and isinstance(wanted, dict):
        inside = {key: _ordered(graph, arg[key], wanted.get(key)) for key in arg}
        if type(wanted) is OrderedDict:
            return graph.call_function(OrderedDict, (list(inside.items()),))
        return inside
    if isinstance(arg, (tuple, list)) and isinstance(wanted, (tuple, list)) and len(arg) == len(wanted):
        inner = [_ordered(graph, a, w) for a, w in zip(arg, wanted, strict=True)]
        return type(arg)(*inner) if hasattr(arg, "_fields") else type(arg)(inner)
    return arg


def _outline(value: Any) -> str:
    leaves, structure = pytree.tree_flatten(value)
    tensors = [
        f"{list(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    ]
    return f"{' '.join(str(structure).split())} of {', '.join(tensors)}"
