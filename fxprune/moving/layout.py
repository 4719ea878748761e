"""Operators that move values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxprune.building.builder import Builder, Operation, Sizes, UnreadableError, Value
from fxprune.moving.sizes import items_of, read_shape, read_size

__all__ = ["LAYOUT"]

Reader = Callable[[Builder, Operation], Any]

_END = 2**31 - 1
_MODES = {
    "nearest": ("nearest",) * 3,
    "linear": ("linear", "bilinear", "trilinear"),
    "cubic": ("", "bicubic", ""),
}


def _rank(b: Builder, x: Value) -> int:
    return len(b.shape(x))


def _reshape(b: Builder, op: Operation) -> Any:
    x, target = op.need(0), op.numbers(1, "shape") or []
    if not op.attributes.get("allowzero", 0):
        target = [b.size(x, i) if isinstance(n, int) and n == 0 else n for i, n in enumerate(target)]
    target = _for_any_batch(b, x, target)
    computed = [i for i, n in enumerate(target) if isinstance(n, fx.Node)]
    if len(computed) == 1 and -1 not in target:
        target[computed[0]] = -1
    rank, sizes = _rank(b, x), b.shape(x)
    if (
        len(target) == 2
        and rank > 2
        and target[0] == -1
        and target[1] == math.prod(sizes[1:]) == math.prod(b.shape(x, 1)[1:])
    ):
        return b.call(torch.flatten, x, 1)
    return b.call(torch.reshape, x, target)


def _for_any_batch(b: Builder, x: Value, target: list[Any]) -> list[Any]:
    """A shape that was written for one batch size, with that of the input in its place.

    The batch keeps its place in memory: what lies before it, in sizes, is the same in both shapes.
    """
    first, second = b.shape(x), b.shape(x, 1)
    if b.free is None or first == second or any(isinstance(n, fx.Node) for n in target):
        return target
    rest = math.prod(n for n in target if n != -1)
    whole = [math.prod(first) // rest if n == -1 else n for n in target]
    dim = next(i for i, (p, q) in enumerate(zip(first, second, strict=True)) if p != q)
    before = math.prod(first[:dim])
    place = next((i for i in range(len(whole)) if math.prod(whole[:i]) == before), None)
    if place is None or target[place] == -1:
        return target
    if -1 not in target:
        return [*target[:place], -1, *target[place + 1 :]]
    if whole[place] % first[dim]:
        return target
    batch = b.call(operator.mul, b.size(x, dim), whole[place] // first[dim])
    return [*target[:place], batch, *target[place + 1 :]]


def _flatten(b: Builder, op: Operation) -> Any:
    x, axis = op.need(0), op.attributes.get("axis", 1)
    rank = _rank(b, x)
    axis = axis + rank if axis < 0 else axis
    if axis == 0:
        return b.call(torch.reshape, x, [1, -1])
    y = b.call(torch.flatten, x, axis) if axis < rank else b.call(torch.unsqueeze, x, -1)
    return y if axis == 1 else b.call(torch.flatten, y, 0, axis - 1)


def _transpose(b: Builder, op: Operation) -> Any:
    order = op.attributes.get("perm", list(reversed(range(_rank(b, op.need(0))))))
    return b.call(torch.permute, op.need(0), order)


def _squeeze(b: Builder, op: Operation) -> Any:
    x, axes = op.need(0), op.known(1, "axes")
    if axes is None:
        axes = [i for i in range(_rank(b, x)) if b.shape(x)[i] == b.shape(x, 1)[i] == 1]
    return b.call(torch.squeeze, x, axes)


def _unsqueeze(b: Builder, op: Operation) -> Any:
    x, axes = op.need(0), op.known(1, "axes") or []
    rank = _rank(b, x) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = b.call(torch.unsqueeze, x, axis)
    return x


def _expand(b: Builder, op: Operation) -> Any:
    x, target = op.need(0), op.numbers(1, "shape") or []
    own = [1] * max(len(target) - _rank(b, x), 0) + list(b.shape(x))
    target = [1] * (len(own) - len(target)) + target
    # a size of 1 in the target keeps what is there
    return b.call("expand", x, [n if size == 1 else -1 for n, size in zip(target, own, strict=True)])


def _tile(b: Builder, op: Operation) -> Any:
    return b.call("repeat", op.need(0), op.numbers(1, "repeats"))


def _concat(b: Builder, op: Operation) -> Any:
    axis = op.attributes["axis"]
    parts = [op.need(i) for i in range(len(op.inputs))]
    parts = [part for part in parts if not (isinstance(part, Tensor) and part.numel() == 0)]
    nodes = [part for part in parts if isinstance(part, fx.Node)]
    if b.free is not None and nodes and axis % _rank(b, nodes[0]) != 0:
        batch = b.size(nodes[0], 0)
        parts = [
            b.call("expand", part, [batch] + [-1] * (part.dim() - 1))
            if isinstance(part, Tensor) and part.shape[0] == 1 and isinstance(batch, fx.Node)
            else part
            for part in parts
        ]
    return b.call(torch.cat, [b.stored(part) for part in parts] if nodes else parts, axis)


def _split(b: Builder, op: Operation) -> Any:
    x, axis = op.need(0), op.attributes.get("axis", 0)
    sizes = op.known(1, "split")
    if sizes is None:
        whole = b.fixed(x, axis)
        each = -(-whole // op.attributes.get("num_outputs", op.outputs))
        sizes = [min(each, whole - start) for start in range(0, whole, each)]
    parts = b.call(torch.split, x, sizes, axis)
    return [b.call(operator.getitem, parts, place) for place in range(op.outputs)]


def _slice(b: Builder, op: Operation) -> Any:
    x, starts, ends = op.need(0), op.numbers(1, "starts") or [], op.numbers(2, "ends") or []
    axes, steps = op.known(3, "axes") or list(range(len(starts))), op.known(4, "steps") or [1] * len(starts)
    rank = _rank(b, x)
    index: list[Any] = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            stop = None if isinstance(end, int) and end >= _END else end
            index[axis] = slice(start or None, stop, None if step == 1 else step)
        elif step == -1 and isinstance(end, int) and end <= -_END and start in (-1, _END, 2**63 - 1):
            x = b.call(torch.flip, x, [axis])
        else:
            raise UnreadableError(f"it steps by {step}")
    while index and index[-1] == slice(None):
        index.pop()
    return b.call(operator.getitem, x, tuple(index)) if index else x


def _filled(b: Builder, op: Operation) -> Any:
    value = op.attributes.get("value", torch.zeros(1))
    shape = op.numbers(0, "shape")
    device = b.device() if isinstance(op.need(0), Sizes) else None
    return b.call(torch.full, shape, value.reshape(()).item(), dtype=value.dtype, device=device)


def _range(b: Builder, op: Operation) -> Any:
    start, end, step = (items_of(op.need(i))[0] for i in range(3))
    dtype = next((v.dtype for v in op.inputs if isinstance(v, Tensor)), torch.int64)
    computed = any(isinstance(value, Sizes) for value in op.inputs)
    return b.call(torch.arange, start, end, step, dtype=dtype, device=b.device() if computed else None)


def _pad(b: Builder, op: Operation) -> Any:
    x, mode = op.need(0), op.attributes.get("mode", "constant")
    rank, given = _rank(b, x), op.known(1, "pads") or []
    axes = [axis % rank for axis in op.known(3, "axes") or range(rank)]
    ends = dict(zip(axes, zip(given[: len(axes)], given[len(axes) :], strict=True), strict=True))
    last = next((dim for dim in range(rank) if any(ends.get(dim, (0, 0)))), None)
    if last is None:
        return x
    flat = [end for dim in reversed(range(last, rank)) for end in ends.get(dim, (0, 0))]
    if mode == "constant":
        fill = op.known(2, "value") or [0.0]
        return b.call(functional.pad, x, flat, "constant", fill[0])
    kind = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(mode)
    if kind is None or last < 2:
        raise UnreadableError(f"it pads by {mode}, in dimension {last}")
    return b.call(functional.pad, x, flat, kind)


def _depth_to_space(b: Builder, op: Operation) -> Any:
    x, block = op.need(0), op.attributes["blocksize"]
    if op.attributes.get("mode", "DCR") == "CRD":
        return b.call(functional.pixel_shuffle, x, block)
    depth = b.fixed(x, 1) // block**2
    split = b.call(torch.unflatten, x, 1, [block, block, depth])
    return b.call(
        functional.pixel_shuffle,
        b.call(torch.flatten, b.call(torch.permute, split, [0, 3, 1, 2, 4, 5]), 1, 3),
        block,
    )


def _space_to_depth(b: Builder, op: Operation) -> Any:
    x, block = op.need(0), op.attributes["blocksize"]
    packed = b.call(functional.pixel_unshuffle, x, block)
    split = b.call(torch.unflatten, packed, 1, [b.fixed(x, 1), block**2])
    return b.call(torch.flatten, b.call(torch.transpose, split, 1, 2), 1, 2)


def _resize(b: Builder, op: Operation) -> Any:
    x = op.need(0)
    old = op.kind == "Upsample" or op.opset < 11
    rank, scales = _rank(b, x), op.known(1 if old else 2, "scales")
    sizes = None if old else op.numbers(3, "sizes")
    axes = [axis % rank for axis in op.attributes.get("axes", range(rank))]
    space = list(range(2, rank))
    if [axis for axis in axes if axis > 1] != space or rank not in (3, 4, 5):
        raise UnreadableError("it resizes other dimensions than height and width")
    mode, align = _interpolation(op, rank - 2, old)
    tail = slice(len(axes) - len(space), None)
    if sizes:
        return b.call(functional.interpolate, x, sizes[tail], None, mode, align)
    if not scales or any(scale != 1 for scale in scales[: tail.start]):
        raise UnreadableError("it resizes batch or channels")
    return b.call(functional.interpolate, x, None, scales[tail], mode, align)


def _interpolation(op: Operation, dims: int, old: bool) -> tuple[str, bool | None]:
    """Torch's mode of interpolation, and whether corners are aligned."""
    given, a = op.attributes.get("mode", "nearest"), op.attributes
    where = a.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    rounding = a.get("nearest_mode", "floor" if old else "round_prefer_floor")
    mode = _MODES.get(given, ("",) * 3)[dims - 1]
    halves = ("half_pixel", "pytorch_half_pixel")
    if mode == "nearest" and (where, rounding) != ("asymmetric", "floor"):
        exact = where in halves and rounding in ("round_prefer_floor", "round_prefer_ceil")
        mode = "nearest-exact" if exact else ""
    elif mode != "nearest" and where not in (*halves, "align_corners"):
        mode = ""
    plain = a.get("antialias", 0) == 0 and a.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if not mode or not plain or (given == "cubic" and a.get("cubic_coeff_a", -0.75) != -0.75):
        raise UnreadableError(f"torch cannot resize so: {given}, {where}, {rounding}")
    return mode, None if mode.startswith("nearest") else where == "align_corners"


def _triangle(b: Builder, op: Operation) -> Any:
    (diagonal,) = op.known(1, "k") or [0]
    return b.call(torch.triu if op.attributes.get("upper", 1) else torch.tril, op.need(0), diagonal)


LAYOUT: dict[str, Reader] = {
    "Concat": _concat, "ConstantOfShape": _filled, "DepthToSpace": _depth_to_space, "Expand": _expand,
    "Flatten": _flatten, "Pad": _pad, "Range": _range,
    "Reshape": _reshape, "Resize": _resize, "Shape": read_shape, "Size": read_size, "Slice": _slice,
    "SpaceToDepth": _space_to_depth, "Split": _split, "Squeeze": _squeeze, "Tile": _tile, "Transpose": _transpose,
    "Trilu": _triangle, "Unsqueeze": _unsqueeze, "Upsample": _resize,
}  # fmt: skip
"""How operators that move values are read."""
