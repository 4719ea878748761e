"""Operators that work value by value, and those that reduce: torch's functions for them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxprune.building.builder import Builder, Operation, UnreadableError, Value
from fxprune.building.file import TYPES
from fxprune.reading.written_out import activation, layer_norm, with_bias, with_weight

__all__ = ["FUNCTIONS"]

Reader = Callable[[Builder, Operation], Any]

_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan, "Log": torch.log, "Mish": functional.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": functional.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": functional.softplus,
    "Softsign": functional.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "Sub": torch.sub,
}  # fmt: skip
_JOINS: dict[str, Callable[..., Any]] = {
    "And": torch.logical_and, "Max": torch.maximum, "Min": torch.minimum, "Or": torch.logical_or, "Sum": torch.add,
    "Xor": torch.logical_xor,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMax": torch.amax, "ReduceMean": torch.mean, "ReduceMin": torch.amin, "ReduceSum": torch.sum,
    "ReduceLogSumExp": torch.logsumexp,
}  # fmt: skip


def _operand(b: Builder, value: Value, other: Value) -> Any:
    """A single number as such, unless its dimensions count."""
    if (
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.dim() <= len(b.shape(other))
        and isinstance(other, fx.Node)
        and b.dtype(value).is_floating_point == b.dtype(other).is_floating_point
    ):
        return value.item()
    return value


def _pair(b: Builder, op: Operation, *, ordered: bool = True) -> tuple[Any, Any]:
    """Both operands. Only the second is ever a number: torch takes others, which its exporter then cannot write."""
    x, y = op.need(0), op.need(1)
    if not ordered and isinstance(x, Tensor):
        x, y = y, x
    return x, _operand(b, y, x)


def _unary(function: Callable[..., Any], b: Builder, op: Operation) -> Any:
    return b.call(function, op.need(0))


def _binary(function: Callable[..., Any], b: Builder, op: Operation) -> Any:
    return b.call(function, *_pair(b, op))


def _add(b: Builder, op: Operation) -> Any:
    for place in (0, 1):
        absorbed = with_bias(b, op.need(place), op.need(1 - place), op.alone[place])
        if absorbed is not None:
            return absorbed
    return b.call(torch.add, *_pair(b, op, ordered=False))


def _mul(b: Builder, op: Operation) -> Any:
    weighted = with_weight(b, op)
    if weighted is not None:
        return weighted
    x, y = _pair(b, op, ordered=False)
    product = activation(b, [x, y])
    return b.call(torch.mul, x, y) if product is None else product


def _div(b: Builder, op: Operation) -> Any:
    x, y = _pair(b, op)
    normalised = layer_norm(b, x, y)
    if normalised is not None:
        return normalised
    whole = not (b.dtype(x).is_floating_point or b.dtype(op.need(1)).is_floating_point)
    if whole:
        return b.call(torch.div, x, y, rounding_mode="trunc")
    product = activation(b, [x], 1 / y) if isinstance(y, float) and y else None
    return b.call(torch.div, x, y) if product is None else product


def _pow(b: Builder, op: Operation) -> Any:
    x, y = op.need(0), op.need(1)
    if isinstance(y, Tensor) and y.numel() == 1 and y.dim() <= len(b.shape(x)):
        return b.call(torch.pow, x, y.item())
    return b.call("to", b.call(torch.pow, x, y), b.dtype(x))


def _variadic(function: Callable[..., Any], b: Builder, op: Operation) -> Any:
    return reduce(lambda x, y: b.call(function, x, y), (op.need(i) for i in range(len(op.inputs))))


def _average(b: Builder, op: Operation) -> Any:
    return b.call(torch.div, _variadic(torch.add, b, op), float(len(op.inputs)))


def _clip(b: Builder, op: Operation) -> Any:
    low, high = op.known(1, "min"), op.known(2, "max")
    least, most = (None if end is None else end[0] for end in (low, high))
    least = None if least is not None and least <= -3e38 else least
    most = None if most is not None and most >= 3e38 else most
    if (least, most) == (0, 6):
        return b.call(functional.relu6, op.need(0))
    if (least, most) == (0, None):
        return b.call(functional.relu, op.need(0))
    return op.need(0) if least is most is None else b.call(torch.clamp, op.need(0), least, most)


def _hard_sigmoid(b: Builder, op: Operation) -> Any:
    alpha, beta = op.attributes.get("alpha", 0.2), op.attributes.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return b.call(functional.hardsigmoid, op.need(0))
    return b.call(torch.clamp, b.call(torch.add, b.call(torch.mul, op.need(0), alpha), beta), 0.0, 1.0)


def _with_slope(function: Callable[..., Any], default: float, b: Builder, op: Operation) -> Any:
    return b.call(function, op.need(0), op.attributes.get("alpha", default))


def _thresholded(b: Builder, op: Operation) -> Any:
    return b.call(functional.threshold, op.need(0), op.attributes.get("alpha", 1.0), 0.0)


def _selu(b: Builder, op: Operation) -> Any:
    alpha, gamma = op.attributes.get("alpha", 1.6732632), op.attributes.get("gamma", 1.0507010)
    if math.isclose(alpha, 1.6732632, rel_tol=1e-5) and math.isclose(gamma, 1.050701, rel_tol=1e-5):
        return b.call(functional.selu, op.need(0))
    return b.call(torch.mul, b.call(functional.elu, op.need(0), alpha), gamma)


def _gelu(b: Builder, op: Operation) -> Any:
    return b.call(functional.gelu, op.need(0), approximate=op.attributes.get("approximate", "none"))


def _softmax(function: Callable[..., Any], b: Builder, op: Operation) -> Any:
    x = op.need(0)
    rank = len(b.shape(x))
    axis = op.attributes.get("axis", -1 if op.opset >= 13 else 1) % rank
    if op.opset >= 13 or axis == rank - 1:
        return b.call(function, x, axis)
    # before operator set 13 all dimensions from the axis on are one
    sizes = [b.size(x, dim) for dim in range(rank)]
    return b.call(torch.reshape, b.call(function, b.call(torch.flatten, x, axis), axis), sizes)


def _cast(b: Builder, op: Operation) -> Any:
    number = op.attributes["to"]
    if number not in TYPES:
        raise UnreadableError(f"it converts to type {number}")
    x = op.need(0)
    return x if b.dtype(x) == TYPES[number] else b.call("to", x, TYPES[number])


def _cast_like(b: Builder, op: Operation) -> Any:
    x, dtype = op.need(0), b.dtype(op.need(1))
    return x if b.dtype(x) == dtype else b.call("to", x, dtype)


def _where(b: Builder, op: Operation) -> Any:
    return b.call(torch.where, *(op.need(i) for i in range(3)))


def _mod(b: Builder, op: Operation) -> Any:
    return b.call(torch.fmod if op.attributes.get("fmod", 0) else torch.remainder, op.need(0), op.need(1))


def _axes(b: Builder, op: Operation) -> list[int] | None:
    """The dimensions that an operator reduces; None if there are none."""
    axes = op.known(1, "axes")
    if not axes and op.attributes.get("noop_with_empty_axes", 0):
        return None
    rank = len(b.shape(op.need(0)))
    return sorted(axis % rank for axis in axes) if axes else list(range(rank))


def _reduced(b: Builder, op: Operation) -> Any:
    x, axes, keep = op.need(0), _axes(b, op), bool(op.attributes.get("keepdims", 1))
    if axes is None:
        return x
    if op.kind in ("ReduceL1", "ReduceL2"):
        return b.call(torch.linalg.vector_norm, x, int(op.kind[-1]), axes, keep)
    if op.kind == "ReduceLogSum":
        return b.call(torch.log, b.call(torch.sum, x, axes, keep))
    if op.kind == "ReduceSumSquare":
        return b.call(torch.sum, b.call(torch.mul, x, x), axes, keep)
    if op.kind == "ReduceProd":
        for axis in reversed(axes):
            x = b.call(torch.prod, x, axis, keep)
        return x
    return b.call(_REDUCTIONS[op.kind], x, axes, keep)


def _extreme(function: Callable[..., Any], b: Builder, op: Operation) -> Any:
    if op.attributes.get("select_last_index", 0):
        raise UnreadableError("it takes the last of equal values")
    return b.call(function, op.need(0), op.attributes.get("axis", 0), bool(op.attributes.get("keepdims", 1)))


def _top(b: Builder, op: Operation) -> Any:
    (count,) = op.known(1, "k") or [0]
    options = (bool(op.attributes.get(name, 1)) for name in ("largest", "sorted"))
    found = b.call(torch.topk, op.need(0), count, op.attributes.get("axis", -1), *options)
    return [b.call(operator.getitem, found, place) for place in range(op.outputs)]


def _cumulated(b: Builder, op: Operation) -> Any:
    if op.attributes.get("exclusive", 0) or op.attributes.get("reverse", 0):
        raise UnreadableError("it sums from the end, or exclusively")
    return b.call(torch.cumsum, op.need(0), int(op.constant(1, "axis")))


def _unit(b: Builder, op: Operation) -> Any:
    axis = op.attributes.get("axis", -1)
    return b.call(functional.normalize, op.need(0), float(op.attributes.get("p", 2)), axis)


def _local_response(b: Builder, op: Operation) -> Any:
    a = op.attributes
    settings = a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0)
    return b.call(functional.local_response_norm, op.need(0), *settings)


def _einsum(b: Builder, op: Operation) -> Any:
    return b.call(torch.einsum, op.attributes["equation"], *op.inputs)


def _same(b: Builder, op: Operation) -> Any:
    return op.need(0)


FUNCTIONS: dict[str, Reader] = {
    **{name: partial(_unary, function) for name, function in _UNARY.items()},
    **{name: partial(_binary, function) for name, function in _BINARY.items()},
    **{name: partial(_variadic, function) for name, function in _JOINS.items()},
    **dict.fromkeys(
        (*_REDUCTIONS, "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceProd", "ReduceSumSquare"), _reduced
    ),
    "Add": _add,
    "ArgMax": partial(_extreme, torch.argmax),
    "ArgMin": partial(_extreme, torch.argmin),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": partial(_with_slope, functional.celu, 1.0),
    "Clip": _clip,
    "CumSum": _cumulated,
    "Div": _div,
    "Dropout": _same,
    "Einsum": _einsum,
    "Elu": partial(_with_slope, functional.elu, 1.0),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "Identity": _same,
    "LRN": _local_response,
    "LeakyRelu": partial(_with_slope, functional.leaky_relu, 0.01),
    "LogSoftmax": partial(_softmax, torch.log_softmax),
    "LpNormalization": _unit,
    "Mean": _average,
    "Mod": _mod,
    "Mul": _mul,
    "Pow": _pow,
    "Selu": _selu,
    "Softmax": partial(_softmax, torch.softmax),
    "ThresholdedRelu": _thresholded,
    "TopK": _top,
    "Where": _where,
}
"""How operators that work value by value, and those that reduce, are read."""
