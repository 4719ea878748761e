"""What inputs and outputs of an ONNX file are called: the same for a network and for what was made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import ExportError, OptionError

__all__ = ["NAMES", "names_of", "rename", "settled"]

NAMES = "onnx_names"
"""Key in a graph's `meta`: names of its inputs and outputs where it was read from a file that has some."""


def names_of(values: Any, base: str) -> list[str]:
    """One name for each tensor of nested values, none twice.

    Args:
        values: What a network takes or returns.
        base: What a tensor is called to which no key of a dict or field of a named tuple leads: `base`, `base_1` ...
    """
    paths = list(_paths(values))
    if len(paths) != sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(values)):
        paths = [""] * len(pytree.tree_leaves(values))  # of a kind that only torch can take apart
    taken = {path for path in paths if path}
    return [p or _free(f"{base}_{place}" if place else base, taken) for place, p in enumerate(paths)]


def _paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The path to each tensor from the outermost key on; empty where no key leads to it."""
    if isinstance(value, Tensor):
        yield "_".join(path)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        yield from _paths(value._asdict(), path)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _paths(part, (*path, str(key)))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _paths(part, (*path, str(index)) if path else ())


def _free(name: str, taken: set[str]) -> str:
    """A name like this one that is not taken; it is from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def settled(
    own: tuple[Sequence[str], Sequence[str]], asked: tuple[Sequence[str] | None, Sequence[str] | None]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of inputs and outputs, those asked for in place of their own.

    Raises:
        OptionError: The names asked for are empty, not unique, or not as many as there are inputs or outputs.
    """
    first, second = (tuple(mine if given is None else given) for mine, given in zip(own, asked, strict=True))
    if asked[1] is None:
        taken = set(first)
        second = tuple([_free(name, taken) for name in second])
    for what, names, count in (("input", first, len(own[0])), ("output", second, len(own[1]))):
        option = f"{what}_names={list(names)}"
        if len(names) != count:
            raise OptionError(f"{option}: the network has {count} {what}s, and {len(names)} names were given")
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < count:
            raise OptionError(f"{option}: give every {what} a name of its own that is not empty")
    for name in second:
        if name in first:
            raise OptionError(f"{name!r} names an input and an output: give one of them another name")
    return first, second


def rename(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives the inputs and outputs of a model their names, in place; what else is called so makes room."""
    graph, names = model.graph, (*inputs, *outputs)
    if (len(graph.inputs), len(graph.outputs)) != (len(inputs), len(outputs)):
        raise ExportError(
            f"torch's exporter wrote {len(graph.inputs)} inputs and {len(graph.outputs)} outputs where the network has "
            f"{len(inputs)} and {len(outputs)}"
        )
    _tell_apart(graph)
    used = {str(value.name) for value in _values(graph)} | set(names)
    for value in _values(graph):
        if value.name in names:
            value.name = _free(str(value.name), used)
    for value, name in zip((*graph.inputs, *graph.outputs), names, strict=True):
        value.name = name


def _tell_apart(graph: ir.Graph) -> None:
    """Lets no value be two outputs, or an input and an output: it could have one name only."""
    seen = set(graph.inputs)
    for place, value in enumerate(graph.outputs):
        if value in seen:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            copy.outputs[0].name = f"{value.name}_{place}"
            graph.append(copy)
            graph.outputs[place] = value = copy.outputs[0]
        seen.add(value)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph and of the graphs inside of its nodes."""
    for part in (graph, *graph.subgraphs()):
        yield from (*part.inputs, *part.initializers.values())
    for node in graph.all_nodes():
        yield from node.outputs
