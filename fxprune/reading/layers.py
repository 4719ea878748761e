"""Operators with weights, and those over windows: torch's modules and functions for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.building.builder import Builder, Operation, UnreadableError, Value

__all__ = ["LAYERS"]

Reader = Callable[[Builder, Operation], Any]
Pads = list[tuple[int, int]]

_CONVOLUTIONS: dict[int, tuple[type[Any], type[Any], Any, Any]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, functional.conv1d, functional.conv_transpose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, functional.conv2d, functional.conv_transpose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, functional.conv3d, functional.conv_transpose3d),
}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_POOLS: dict[str, dict[int, Any]] = {
    "AveragePool": {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d},
    "MaxPool": {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d},
    "GlobalAveragePool": {
        1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d,
    },
    "GlobalMaxPool": {
        1: functional.adaptive_max_pool1d, 2: functional.adaptive_max_pool2d, 3: functional.adaptive_max_pool3d,
    },
}  # fmt: skip


def _spatial(b: Builder, x: Value) -> int:
    dims = len(b.shape(x)) - 2
    if dims not in (1, 2, 3):
        raise UnreadableError(f"its input has {dims + 2} dimensions")
    return dims


def _window(op: Operation, name: str, dims: int, default: int = 1) -> list[int]:
    return list(op.attributes.get(name, [default] * dims))


def _pads(b: Builder, op: Operation, x: Value, kernel: Sequence[int], strides: Sequence[int]) -> Pads:
    """Padding before and after in each dimension, negative where the input is cropped."""
    how = op.attributes.get("auto_pad", "NOTSET")
    dims = len(kernel)
    if how == "NOTSET":
        given = _window(op, "pads", 2 * dims, 0)
        return list(zip(given[:dims], given[dims:], strict=True))
    if how == "VALID":
        return [(0, 0)] * dims
    found = []
    for dim, (k, s) in enumerate(zip(kernel, strides, strict=True)):
        trials = {
            max((-(-b.shape(x, p)[dim + 2] // s) - 1) * s + k - b.shape(x, p)[dim + 2], 0) for p in (0, 1)
        }
        if len(trials) > 1:
            raise UnreadableError(f"its auto_pad {how} follows the size of the network's input")
        total = trials.pop()
        less, more = total // 2, total - total // 2
        found.append((less, more) if how == "SAME_UPPER" else (more, less))
    return found


def _even(pads: Pads) -> list[int] | None:
    """The padding of each dimension, None where it differs at the two ends, or crops."""
    return [a for a, _ in pads] if all(a == z and a >= 0 for a, z in pads) else None


def _padded(b: Builder, x: Value, pads: Pads, value: float = 0.0) -> Any:
    if not any(map(any, pads)):
        return x
    flat = [end for pair in reversed(pads) for end in pair]
    return b.call(functional.pad, x, flat, "constant", value)


def _extent(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


def _weighted(
    kind: type[Any], weight: Tensor, bias: Tensor | None, *sizes: Any, **settings: Any
) -> nn.Module:
    """A convolution or linear layer with given weights, without drawing others first."""
    module: nn.Module = kind(*sizes, bias=bias is not None, device="meta", **settings)
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def _conv(b: Builder, op: Operation) -> Any:
    x, weight, bias = op.need(0), op.need(1), op.get(2)
    dims = _spatial(b, x)
    kernel = [b.fixed(weight, dim + 2) for dim in range(dims)]
    strides, dilations = _window(op, "strides", dims), _window(op, "dilations", dims)
    groups = op.attributes.get("group", 1)
    pads = _pads(b, op, x, _extent(kernel, dilations), strides)
    padding = _even(pads)
    if padding is None:
        x, padding = _padded(b, x, pads), [0] * dims
    if not isinstance(weight, Tensor) or isinstance(bias, fx.Node):
        return b.call(_CONVOLUTIONS[dims][2], x, weight, bias, strides, padding, dilations, groups)
    assert bias is None or isinstance(bias, Tensor)
    settings = {"stride": strides, "padding": padding, "dilation": dilations}
    return b.module(
        op,
        lambda: _weighted(
            _CONVOLUTIONS[dims][0],
            weight,
            bias,
            weight.shape[1] * groups,
            weight.shape[0],
            kernel,
            groups=groups,
            **{name: tuple(values) for name, values in settings.items()},
        ),
        x,
    )


def _conv_transpose(b: Builder, op: Operation) -> Any:
    x, weight, bias = op.need(0), op.constant(1, "weight"), op.get(2)
    if "output_shape" in op.attributes:
        raise UnreadableError("its output_shape is given")
    if isinstance(bias, fx.Node):
        raise UnreadableError("its bias is computed from the network's input")
    dims, kernel = _spatial(b, x), list(weight.shape[2:])
    strides, dilations = _window(op, "strides", dims), _window(op, "dilations", dims)
    extra, groups = _window(op, "output_padding", dims, 0), op.attributes.get("group", 1)
    how = op.attributes.get("auto_pad", "NOTSET")
    if how in ("NOTSET", "VALID"):
        pads = _pads(b, op, x, kernel, strides)
    else:
        totals = [
            max(k + e - s, 0) for k, e, s in zip(_extent(kernel, dilations), extra, strides, strict=True)
        ]
        pads = [(t // 2, t - t // 2) if how == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]
    padding = _even(pads)
    settings = {
        "stride": strides, "padding": padding or [0] * dims, "output_padding": extra, "dilation": dilations,
    }  # fmt: skip
    y = b.module(
        op,
        lambda: _weighted(
            _CONVOLUTIONS[dims][1],
            weight,
            bias if isinstance(bias, Tensor) else None,
            weight.shape[0],
            weight.shape[1] * groups,
            kernel,
            groups=groups,
            **{name: tuple(values) for name, values in settings.items()},
        ),
        x,
    )
    return y if padding is not None else _padded(b, y, [(-a, -z) for a, z in pads])


def _batch_norm(b: Builder, op: Operation) -> Any:
    x = op.need(0)
    kind = _BATCH_NORMS.get(len(b.shape(x)))
    if kind is None or op.attributes.get("training_mode", 0) or op.attributes.get("spatial", 1) != 1:
        raise UnreadableError("it normalises by the batch, or not by channels")
    weight, bias, mean, var = (
        op.constant(i, name) for i, name in enumerate(("scale", "bias", "mean", "variance"), 1)
    )

    def build() -> nn.Module:
        norm = kind(len(mean), op.attributes.get("epsilon", 1e-5), 1 - op.attributes.get("momentum", 0.9))
        norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
        norm.running_mean, norm.running_var = mean.clone(), var.clone()
        return norm

    return b.module(op, build, x)


def _linear(b: Builder, op: Operation, x: Value, weight: Tensor, bias: Tensor | None) -> fx.Node:
    outer, inner = weight.shape
    return b.module(op, lambda: _weighted(nn.Linear, weight.contiguous(), bias, inner, outer), x)


def _gemm(b: Builder, op: Operation) -> Any:
    x, weight, bias = op.need(0), op.need(1), op.get(2)
    alpha, beta = op.attributes.get("alpha", 1.0), op.attributes.get("beta", 1.0)
    flip_x, flip_weight = op.attributes.get("transA", 0), op.attributes.get("transB", 0)
    if flip_x:
        x = b.call(torch.transpose, x, 0, 1)
    stored = isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    outer = b.shape(weight)[0 if flip_weight else 1]
    if stored and alpha == beta == 1 and (bias is None or b.shape(bias) in ((outer,), (1, outer))):
        assert isinstance(weight, Tensor)
        flat = bias.reshape(-1) if isinstance(bias, Tensor) else None
        return _linear(b, op, x, weight if flip_weight else weight.T, flat)
    if flip_weight:
        weight = b.call(torch.transpose, weight, 0, 1)
    y = b.call(torch.matmul, x, weight)
    if alpha != 1:
        y = b.call(torch.mul, y, alpha)
    if bias is None:
        return y
    return b.call(torch.add, y, bias if beta == 1 else b.call(torch.mul, bias, beta))


def _matmul(b: Builder, op: Operation) -> Any:
    x, weight = op.need(0), op.need(1)
    if isinstance(weight, Tensor) and weight.dim() == 2 and isinstance(x, fx.Node) and len(b.shape(x)) > 1:
        module = _linear(b, op, x, weight.T, None)
        b.without_bias.update([module] if op.alone[1] else [])
        return module
    return b.call(torch.matmul, x, weight)


def _layer_norm(b: Builder, op: Operation) -> Any:
    x, weight = op.need(0), op.get(1)
    bias, axis, eps = op.get(2), op.attributes.get("axis", -1), op.attributes.get("epsilon", 1e-5)
    rank = len(b.shape(x))
    shape = [b.fixed(x, dim) for dim in range(axis % rank, rank)]
    fits = isinstance(weight, Tensor) and list(weight.shape) == shape
    if not fits or isinstance(bias, fx.Node):
        y = b.call(functional.layer_norm, x, shape, None, None, eps)
        y = y if weight is None else b.call(torch.mul, y, weight)
        return y if bias is None else b.call(torch.add, y, bias)

    def build() -> nn.Module:
        assert isinstance(weight, Tensor)
        norm = nn.LayerNorm(shape, eps, bias=bias is not None)
        norm.weight = nn.Parameter(weight)
        if isinstance(bias, Tensor):
            norm.bias = nn.Parameter(bias.expand(shape).clone())
        return norm

    return b.module(op, build, x)


def _group_norm(b: Builder, op: Operation) -> Any:
    x, weight, bias = op.need(0), op.constant(1, "scale"), op.constant(2, "bias")
    groups, channels = op.attributes["num_groups"], b.fixed(x, 1)
    if len(weight) != channels:  # before operator set 21 one for each group
        weight, bias = (v.repeat_interleave(channels // groups) for v in (weight, bias))
    return b.call(functional.group_norm, x, groups, weight, bias, op.attributes.get("epsilon", 1e-5))


def _instance_norm(b: Builder, op: Operation) -> Any:
    scale, bias = op.need(1), op.need(2)
    eps = op.attributes.get("epsilon", 1e-5)
    return b.call(functional.instance_norm, op.need(0), weight=scale, bias=bias, eps=eps)


def _prelu(b: Builder, op: Operation) -> Any:
    x, slope = op.need(0), op.constant(1, "slope")
    rank, channels = len(b.shape(x)), b.shape(x)[1]
    if slope.numel() > 1 and (
        slope.numel() != channels or slope.dim() != rank - 1 or slope.shape[0] != channels
    ):
        raise UnreadableError(f"its slope has the shape {tuple(slope.shape)}")

    def build() -> nn.Module:
        module = nn.PReLU(slope.numel())
        module.weight = nn.Parameter(slope.reshape(-1))
        return module

    return b.module(op, build, x)


def _pool(b: Builder, op: Operation) -> Any:
    x, average = op.need(0), op.kind == "AveragePool"
    dims = _spatial(b, x)
    kernel, strides = _window(op, "kernel_shape", dims), _window(op, "strides", dims)
    dilations, ceil = _window(op, "dilations", dims), bool(op.attributes.get("ceil_mode", 0))
    if op.outputs > 1 or (average and set(dilations) != {1}):
        raise UnreadableError("it yields indices, or its average is dilated")
    pads = _pads(b, op, x, _extent(kernel, dilations), strides)
    counted = bool(op.attributes.get("count_include_pad", 0))
    padding = _even(pads)
    if padding is None or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        if average and not counted:
            raise UnreadableError("it averages over uneven padding that it does not count")
        x, padding, counted = _padded(b, x, pads, 0.0 if average else -math.inf), [0] * dims, False
    pool = _POOLS[op.kind][dims]
    if average:
        return b.call(pool, x, kernel, strides, padding, ceil, counted)
    return b.call(pool, x, kernel, strides, padding, dilations, ceil)


def _global_pool(b: Builder, op: Operation) -> Any:
    x = op.need(0)
    return b.call(_POOLS[op.kind][_spatial(b, x)], x, 1)


def _attention(b: Builder, op: Operation) -> Any:
    query, key, value, mask = op.need(0), op.need(1), op.need(2), op.get(3)
    more = op.outputs > 1 or any(x is not None for x in op.inputs[4:]) or op.attributes.get("softcap", 0)
    if more or len(b.shape(query)) != 4:
        raise UnreadableError("it keeps keys and values, caps scores, or has its heads side by side")
    causal, scale = bool(op.attributes.get("is_causal", 0)), op.attributes.get("scale")
    shared = {"enable_gqa": True} if b.fixed(query, 1) != b.fixed(key, 1) else {}
    attend = functional.scaled_dot_product_attention
    return b.call(attend, query, key, value, mask, 0.0, causal, scale=scale, **shared)


def _grid_sample(b: Builder, op: Operation) -> Any:
    mode, outside = op.attributes.get("mode", "linear"), op.attributes.get("padding_mode", "zeros")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    aligned = bool(op.attributes.get("align_corners", 0))
    return b.call(functional.grid_sample, op.need(0), op.need(1), mode, outside, aligned)


LAYERS: dict[str, Reader] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "PRelu": _prelu,
}
"""How operators with weights, and those over windows, are read."""
