"""Folding bias-free adaptors into weights, on tensors alone.

For a weight `W[o, i, ...]` and a square map `A`:

    after (POST):   W'[o] = sum_p A[o, p] W[p]        b'[o] = sum_p A[o, p] b[p]
    before (PRE):   W'[:, i] = sum_p W[:, p] A[p, i]  b' = b

Both are exact: a convolution is linear in its input channels, a bias-free 1x1 map keeps zero padding zero and
commutes with reflect, replicate and circular padding, with stride and with dilation. (PRACTISE, section 3.2.)
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from fxprune.errors import FoldError

__all__ = ["Layout", "fold_bias_post", "fold_post", "fold_pre"]


class Layout(str, Enum):
    """How a weight tensor holds its output and input channels."""

    CONV = "conv"  # [out, in / groups, *kernel], channels at dimension 1 of the data
    CONV_TRANSPOSE = "conv_transpose"  # [in, out / groups, *kernel]
    LINEAR = "linear"  # [out, in], channels last


def _check(adaptor: Tensor, channels: int) -> None:
    if tuple(adaptor.shape) != (channels, channels):
        raise FoldError(f"an adaptor of shape {tuple(adaptor.shape)} does not fit {channels} channels")


def fold_post(weight: Tensor, adaptor: Tensor, layout: Layout) -> Tensor:
    """Folds an adaptor that stands after an operator.

    Args:
        weight: `[out, in, *kernel]`, or `[in, out, *kernel]` for a transposed convolution.
        adaptor: `[out, out]`.
        layout: How `weight` is laid out.

    Returns:
        The new weight, in the type and differentiable in both arguments.

    Raises:
        FoldError: The shapes do not fit.
    """
    if layout is Layout.CONV_TRANSPOSE:
        _check(adaptor, weight.shape[1])
        return torch.einsum("op,ip...->io...", adaptor, weight)
    _check(adaptor, weight.shape[0])
    return (adaptor @ weight.flatten(1)).reshape(weight.shape)


def fold_bias_post(bias: Tensor, adaptor: Tensor) -> Tensor:
    """Folds an adaptor that stands after an operator into its bias `[out]`."""
    _check(adaptor, bias.shape[0])
    return adaptor @ bias


def fold_pre(weight: Tensor, adaptor: Tensor, layout: Layout) -> Tensor:
    """Folds an adaptor `[in, in]` that stands before an operator; else as `fold_post`."""
    if layout is Layout.CONV_TRANSPOSE:
        _check(adaptor, weight.shape[0])
        return (adaptor.T @ weight.flatten(1)).reshape(weight.shape)
    _check(adaptor, weight.shape[1])
    return torch.einsum("op...,pi->oi...", weight, adaptor)
