"""Operators that take values from places, or put them there."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.building.builder import Builder, Operation, Sizes, UnreadableError

__all__ = ["INDEXING"]

Reader = Callable[[Builder, Operation], Any]


def _gather(b: Builder, op: Operation) -> Any:
    x, places, axis = op.need(0), op.need(1), op.attributes.get("axis", 0)
    axis %= len(b.shape(x))
    if isinstance(places, Sizes):
        if not places.scalar:
            raise UnreadableError("its indices follow the size of the network's input")
        return b.call(torch.select, x, axis, places.items[0])
    if isinstance(places, Tensor):
        if places.dim() == 0:
            return b.call(torch.select, x, axis, int(places))
        if bool((places < 0).any()):
            places = torch.where(places < 0, places + b.fixed(x, axis), places)
        if places.dim() == 1 and len(places) > 1 and bool((places.diff() == 1).all()):
            index = [slice(None)] * axis + [slice(int(places[0]), int(places[-1]) + 1)]
            return b.call(operator.getitem, x, tuple(index))
    flat = b.call(torch.reshape, places, [-1])
    taken = b.call(torch.index_select, x, axis, flat)
    if len(b.shape(places)) == 1:
        return taken
    around = [b.size(x, dim) for dim in range(len(b.shape(x)))]
    inner = [b.size(places, dim) for dim in range(len(b.shape(places)))]
    return b.call(torch.reshape, taken, around[:axis] + inner + around[axis + 1 :])


def _gather_elements(b: Builder, op: Operation) -> Any:
    return b.call(torch.gather, op.need(0), op.attributes.get("axis", 0), op.need(1))


def _places(b: Builder, op: Operation) -> tuple[Any, ...]:
    """For each of the first dimensions, where in it: the last dimension of the indices counts them."""
    places = op.need(1)
    parts = b.call(torch.unbind, places, -1)
    return tuple(b.call(operator.getitem, parts, dim) for dim in range(b.fixed(places, -1)))


def _gather_nd(b: Builder, op: Operation) -> Any:
    if op.attributes.get("batch_dims", 0):
        raise UnreadableError("it takes from each image by indices of its own")
    return b.call(operator.getitem, op.need(0), _places(b, op))


def _adds(op: Operation) -> bool:
    """Whether what is put to a place is added to what is there."""
    how = op.attributes.get("reduction", "none")
    if how not in ("none", "add"):
        raise UnreadableError(f"it joins values by {how}")
    return bool(how == "add")


def _scatter_nd(b: Builder, op: Operation) -> Any:
    return b.call(torch.index_put, op.need(0), _places(b, op), op.need(2), _adds(op))


def _scatter_elements(b: Builder, op: Operation) -> Any:
    function = torch.scatter_add if _adds(op) else torch.scatter
    return b.call(function, op.need(0), op.attributes.get("axis", 0), op.need(1), op.need(2))


INDEXING: dict[str, Reader] = {
    "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements, "ScatterND": _scatter_nd,
}  # fmt: skip
"""How operators that take values from places, or put them there, are read."""
