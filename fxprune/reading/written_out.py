"""What exporters write out in small operators, seen again where it ends: activations, layer norms, biases.

As one function or module a region may end in it, an adaptor may fold into it, and it is as fast as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.building.builder import Builder, Operation, Value

__all__ = ["activation", "is_call", "layer_norm", "with_bias", "with_weight"]


def is_call(value: object, *functions: Callable[..., Any]) -> TypeGuard[fx.Node]:
    """Whether a value is what one of some functions returns."""
    return isinstance(value, fx.Node) and value.target in functions


def with_bias(b: Builder, value: Value, bias: Value, alone: bool) -> fx.Node | None:
    """A linear layer or layer norm that takes what is added to it as its bias."""
    if not isinstance(value, fx.Node) or value not in b.without_bias or not alone:
        return None
    module: Any = b.root.get_submodule(str(value.target))
    channels = len(module.weight)
    if not isinstance(bias, Tensor) or not bias.shape[-1:] == (bias.numel(),) == (channels,):
        return None
    b.without_bias.discard(value)
    module.bias = nn.Parameter(bias.reshape(-1))
    return value


def with_weight(b: Builder, op: Operation) -> fx.Node | None:
    """A layer norm that takes what it is multiplied by as its weight."""
    for place in (0, 1):
        norm, weight = op.need(place), op.need(1 - place)
        if not is_call(norm, functional.layer_norm) or not isinstance(weight, Tensor) or not op.alone[place]:
            continue
        x, shape, _, _, eps = _given(norm)
        if list(weight.shape) == shape:
            call = b.module(op, partial(_norm_of, weight, eps), x)
            b.without_bias.update([call] if op.alone[1 - place] else [])
            return call
    return None


def _given(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _norm_of(weight: Tensor, eps: float) -> nn.Module:
    norm = nn.LayerNorm(weight.shape, eps, bias=False)
    norm.weight = nn.Parameter(weight)
    return norm


def activation(b: Builder, factors: list[Any], scale: float = 1.0) -> Any:
    """The activation that a product is, None if it is none; factors that are products themselves are taken apart."""
    nodes: list[fx.Node] = []
    pending = list(factors)
    while pending and len(nodes) < 4:
        value = pending.pop(0)
        if isinstance(value, (int, float)):
            scale *= value
        elif is_call(value, torch.mul):
            pending += value.args
        elif is_call(value, torch.div) and isinstance(value.args[1], float):
            scale /= value.args[1]
            pending.append(value.args[0])
        elif isinstance(value, fx.Node):
            nodes.append(value)
        else:
            return None
    for x, gate in (nodes, nodes[::-1]) if len(nodes) == 2 else ():
        for function, factor, form in _FORMS:
            if math.isclose(scale, factor, rel_tol=1e-4) and form(gate, x):
                return b.call(function, x)
    return None


def _of(value: Any, *functions: Callable[..., Any]) -> Any:
    """What a function of one tensor, maybe with numbers, was called with; None for another value."""
    return value.args[0] if is_call(value, *functions) else None


def _plus(value: Any, number: float) -> Any:
    """What a number was added to; None for another value."""
    if not is_call(value, torch.add) or number not in value.args:
        return None
    return next((part for part in value.args if isinstance(part, fx.Node)), None)


def _times(value: Any, number: float) -> Any:
    """What was multiplied by a number; None for another value."""
    if is_call(value, torch.mul, torch.div):
        first, second = value.args
        if isinstance(second, float) and second:
            factor = 1 / second if value.target is torch.div else second
            return first if math.isclose(factor, number, rel_tol=1e-4) else None
    return None


_FORMS: tuple[tuple[Callable[..., Any], float, Callable[[Any, Any], bool]], ...] = (
    (functional.silu, 1.0, lambda gate, x: _of(gate, torch.sigmoid) is x),
    (functional.hardswish, 1.0, lambda gate, x: _of(gate, functional.hardsigmoid) is x),
    (functional.hardswish, 1 / 6, lambda gate, x: _plus(_of(gate, functional.relu6), 3.0) is x),
    (functional.mish, 1.0, lambda gate, x: _of(_of(gate, torch.tanh), functional.softplus) is x),
    (functional.gelu, 0.5, lambda gate, x: _times(_of(_plus(gate, 1.0), torch.erf), 0.5**0.5) is x),
)
"""Activations, each with the number that x times its gate is multiplied by, and what the gate is."""


def layer_norm(b: Builder, x: Any, y: Any) -> Any:
    """The layer norm that a quotient is, None if it is none."""
    power = _of(_of(y, torch.sqrt), torch.add)
    squares = _of(power, torch.mean)
    squared = _of(squares, torch.pow)
    if squared is None and is_call(squares, torch.mul) and squares.args[0] is squares.args[1]:
        squared = squares.args[0]
    if not (is_call(x, torch.sub) and is_call(squared, torch.sub) and x.args == squared.args):
        return None
    source, mean = _given(x)
    if _of(mean, torch.mean) is not source or (mean.args[1:] != power.args[1:]):
        return None
    rank, eps = len(b.shape(source)), y.args[0].args[1]
    if [dim % rank for dim in mean.args[1]] != [rank - 1] or not mean.args[2] or not isinstance(eps, float):
        return None
    return b.call(functional.layer_norm, source, [b.fixed(source, -1)], None, None, eps)
