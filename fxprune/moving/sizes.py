"""The arithmetic of sizes: shapes that an ONNX file computes, as numbers where they are fixed, else as nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.building.builder import Builder, Operation, Sizes, UnreadableError, Value
from fxprune.building.file import TYPES

__all__ = ["items_of", "read_shape", "read_size", "sizes_reader"]

Reader = Callable[[Builder, Operation], Any]

_END = 2**31 - 1


def _sizes(items: Sequence[Any], scalar: bool = False) -> Value:
    """Sizes, or a tensor where all of them are known."""
    if any(isinstance(item, fx.Node) for item in items):
        return Sizes(tuple(items), scalar)
    return torch.tensor(items[0] if scalar else list(items))


def items_of(value: Value | None) -> list[Any]:
    """The numbers, or nodes that yield them, of sizes."""
    if isinstance(value, Sizes):
        return list(value.items)
    if not isinstance(value, Tensor) or value.dim() > 1:
        raise UnreadableError("it computes sizes from values")
    return value.reshape(-1).tolist()


def _is_scalar(value: Value | None) -> bool:
    return value.scalar if isinstance(value, Sizes) else isinstance(value, Tensor) and value.dim() == 0


def read_shape(b: Builder, op: Operation) -> Any:
    """The shape of a tensor, or a part of it."""
    x = op.need(0)
    dims = range(len(b.shape(x)))[op.attributes.get("start", 0) : op.attributes.get("end", _END)]
    return _sizes([b.size(x, dim) for dim in dims]) if dims else torch.empty(0, dtype=torch.int64)


def read_size(b: Builder, op: Operation) -> Any:
    """How many values a tensor has."""
    x = op.need(0)
    sizes = [b.size(x, dim) for dim in range(len(b.shape(x)))]
    return _sizes([reduce(lambda p, q: b.call(operator.mul, p, q), sizes, 1)], True)


def _arithmetic(function: Callable[..., Any], b: Builder, op: Operation) -> Any:
    first, second = op.need(0), op.need(1)
    one, two = items_of(first), items_of(second)
    length = max(len(one), len(two))
    pairs = zip(one * (length // len(one)), two * (length // len(two)), strict=True)
    items = [b.call(function, p, q) for p, q in pairs]
    return _sizes(items, _is_scalar(first) and _is_scalar(second))


def _sizes_div(b: Builder, op: Operation) -> Any:
    whole = all(isinstance(b.tried(i)[0], int) for place in (0, 1) for i in items_of(op.need(place)))
    return _arithmetic(operator.floordiv if whole else operator.truediv, b, op)


def _sizes_cast(b: Builder, op: Operation) -> Any:
    value = op.need(0)
    convert = torch.sym_float if TYPES[op.attributes["to"]].is_floating_point else torch.sym_int
    wanted = float if convert is torch.sym_float else int
    items = [i if isinstance(b.tried(i)[0], wanted) else b.call(convert, i) for i in items_of(value)]
    return _sizes(items, _is_scalar(value))


def _sizes_floor(b: Builder, op: Operation) -> Any:
    value = op.need(0)
    items = [
        b.call(torch.sym_float, b.call(torch.sym_int, i)) for i in items_of(value)
    ]  # they are not negative
    return _sizes(items, _is_scalar(value))


def _sizes_gather(b: Builder, op: Operation) -> Any:
    items, places = items_of(op.need(0)), op.constant(1, "index")
    if places.dim() > 1:
        raise UnreadableError("it computes sizes from values")
    return _sizes([items[int(place)] for place in places.reshape(-1)], places.dim() == 0)


def _sizes_slice(b: Builder, op: Operation) -> Any:
    items = items_of(op.need(0))
    starts, ends = op.known(1, "starts") or [0], op.known(2, "ends") or [_END]
    (step,) = op.known(4, "steps") or [1]
    return _sizes(items[starts[0] : ends[0] : step])


def _sizes_concat(b: Builder, op: Operation) -> Any:
    return _sizes([item for value in op.inputs for item in items_of(value)])


def _same(b: Builder, op: Operation) -> Any:
    return op.need(0)


def _sizes_rank(b: Builder, op: Operation) -> Any:
    value = op.need(0)
    if op.kind == "Unsqueeze" and not _is_scalar(value):
        raise UnreadableError("it makes a matrix of sizes")
    target = op.numbers(1, "shape") if op.kind == "Reshape" else None
    return _sizes(items_of(value), target == [] or (op.kind == "Squeeze" and len(items_of(value)) == 1))


def _sizes_product(b: Builder, op: Operation) -> Any:
    product = reduce(lambda p, q: b.call(operator.mul, p, q), items_of(op.need(0)), 1)
    return _sizes([product], not op.attributes.get("keepdims", 1))


def _sizes_equal(b: Builder, op: Operation) -> Any:
    one, two = items_of(op.need(0)), items_of(op.need(1))
    length, found = max(len(one), len(two)), []
    for p, q in zip(one * (length // len(one)), two * (length // len(two)), strict=True):
        trials = {x == y for x, y in zip(b.tried(p), b.tried(q), strict=True)}
        if len(trials) > 1:
            raise UnreadableError("it decides by the size of the network's input")
        found.append(trials.pop())
    return torch.tensor(found)


def _sizes_where(b: Builder, op: Operation) -> Any:
    chosen = op.constant(0, "condition").reshape(-1).tolist()
    one, two = (items_of(op.need(i)) * (len(chosen) if len(items_of(op.need(i))) == 1 else 1) for i in (1, 2))
    return _sizes([p if first else q for first, p, q in zip(chosen, one, two, strict=True)])


_JOINS: dict[str, Reader] = {
    "Add": partial(_arithmetic, operator.add), "Concat": _sizes_concat, "Div": _sizes_div, "Equal": _sizes_equal,
    "Mul": partial(_arithmetic, operator.mul), "Sub": partial(_arithmetic, operator.sub), "Where": _sizes_where,
}  # fmt: skip
_OF_SIZES: dict[str, Reader] = {
    "Cast": _sizes_cast, "Floor": _sizes_floor, "Gather": _sizes_gather, "Identity": _same,
    "ReduceProd": _sizes_product, "Reshape": _sizes_rank, "Slice": _sizes_slice, "Squeeze": _sizes_rank,
    "Unsqueeze": _sizes_rank,
}  # fmt: skip


def sizes_reader(op: Operation) -> Reader | None:
    """How an operator is read that computes sizes from sizes; None for every other one."""
    if any(isinstance(value, fx.Node) for value in op.inputs):
        return None
    if isinstance(op.get(0), Sizes):
        return (_OF_SIZES | _JOINS).get(op.kind)
    return _JOINS.get(op.kind) if any(isinstance(value, Sizes) for value in op.inputs) else None
