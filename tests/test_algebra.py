"""Folding formulas against inserted 1x1 convolutions, for every kind of dense operator."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from fxprune.errors import FoldError
from fxprune.placement.algebra import Layout, fold_bias_post, fold_post, fold_pre
from tests.laws import law
from tests.strategies import OperatorSpec, operator_specs

MODES = ("zeros", "reflect", "replicate", "circular")
SPECS = [
    *(
        OperatorSpec(Layout.CONV, kernel=k, stride=s, dilation=d, padding_mode=mode)
        for k, s, d, mode in itertools.product((1, 3, 5), (1, 2), (1, 2), MODES)
        if d * (k // 2) < 7
    ),
    *(
        OperatorSpec(Layout.CONV_TRANSPOSE, kernel=k, stride=s, dilation=d)
        for k, s, d in itertools.product((1, 3, 5), (1, 2), (1, 2))
    ),
    *(OperatorSpec(layout, dims=n) for layout in (Layout.CONV, Layout.CONV_TRANSPOSE) for n in (1, 3)),
    OperatorSpec(Layout.LINEAR),
    OperatorSpec(Layout.CONV, bias=False),
    OperatorSpec(Layout.LINEAR, bias=False),
]


def square(channels: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, channels, generator=generator, dtype=torch.float64).to(dtype)


def mixed(x: Tensor, adaptor: Tensor, layout: Layout) -> Tensor:
    """A 1x1 convolution with the adaptor as its kernel, by another way than the library's."""
    if layout is Layout.LINEAR:
        return torch.einsum("op,...p->...o", adaptor, x)
    return torch.einsum("op,np...->no...", adaptor, x)


@torch.no_grad()
def fold_errors(spec: OperatorSpec, dtype: torch.dtype) -> tuple[float, float]:
    """Worst differences, PRE and POST, relative to the largest value."""
    module: Any = spec.build(dtype)
    x = spec.inputs(dtype)
    before, after = square(spec.inner, 2, dtype), square(spec.outer, 3, dtype)
    folded: list[Any] = [copy.deepcopy(module), copy.deepcopy(module)]
    folded[0].weight.copy_(fold_pre(module.weight, before, spec.layout))
    folded[1].weight.copy_(fold_post(module.weight, after, spec.layout))
    if module.bias is not None:
        folded[1].bias.copy_(fold_bias_post(module.bias, after))
    wanted = [module(mixed(x, before, spec.layout)), mixed(module(x), after, spec.layout)]
    first, second = (
        float((f(x) - w).abs().max()) / max(1.0, float(w.abs().max()))
        for f, w in zip(folded, wanted, strict=True)
    )
    return first, second


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_folding_equals_an_inserted_map(spec: OperatorSpec) -> None:
    assert max(fold_errors(spec, torch.float64)) <= 1e-10
    assert max(fold_errors(spec, torch.float32)) <= 1e-5


@law(40)
@given(operator_specs())
def test_folding_random_operators(spec: OperatorSpec) -> None:
    assert max(fold_errors(spec, torch.float64)) <= 1e-10


@law(20)
@given(operator_specs(grouped=True))
def test_a_dense_map_does_not_fit_the_input_of_a_grouped_operator(spec: OperatorSpec) -> None:
    module: Any = spec.build()
    width, fold = (spec.inner, fold_pre) if spec.layout is Layout.CONV else (spec.outer, fold_post)
    with pytest.raises(FoldError, match=rf"\({width}, {width}\) does not fit {width // 2} channels"):
        fold(module.weight, square(width, 0), spec.layout)


@pytest.mark.parametrize("spec", [SPECS[0], OperatorSpec(Layout.CONV_TRANSPOSE), OperatorSpec(Layout.LINEAR)])
def test_the_identity_changes_no_bit(spec: OperatorSpec) -> None:
    module: Any = spec.build(torch.float32)
    pre = fold_pre(module.weight.double(), torch.eye(spec.inner).double(), spec.layout)
    post = fold_post(module.weight.double(), torch.eye(spec.outer).double(), spec.layout)
    assert torch.equal(pre.float(), module.weight)
    assert torch.equal(post.float(), module.weight)
    assert torch.equal(
        fold_bias_post(module.bias.double(), torch.eye(spec.outer).double()), module.bias.double()
    )


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4), (4,), (1, 4, 4)])
def test_maps_of_the_wrong_shape_are_refused(layout: Layout, shape: tuple[int, ...]) -> None:
    weight: Any = OperatorSpec(layout, inner=4, outer=6).build()
    with pytest.raises(FoldError, match="does not fit"):
        fold_pre(weight.weight, torch.zeros(shape), layout)
    with pytest.raises(FoldError, match="does not fit"):
        fold_post(weight.weight, torch.zeros(shape), layout)
    with pytest.raises(FoldError, match="does not fit 6 channels"):
        fold_bias_post(weight.bias, torch.zeros(shape))


@pytest.mark.parametrize("layout", list(Layout))
def test_gradients_flow_through_the_fold(layout: Layout) -> None:
    module: Any = OperatorSpec(layout, inner=2, outer=2, kernel=1).build()
    map_ = square(2, 4).requires_grad_()
    for fold in (fold_pre, fold_post):
        assert torch.autograd.gradcheck(
            lambda w, a, fold=fold: fold(w, a, layout), (module.weight.detach().requires_grad_(), map_)
        )


@torch.no_grad()
def test_a_bias_in_front_of_zero_padding_would_not_fold() -> None:
    """Why adaptors have no bias: at the border the operator sees zeros where the bias would have been."""
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.zeros(1, 4, 7, 7, dtype=torch.float64)
    shifted = conv(x + 1.0)
    assert float((shifted[..., 0, 0] - shifted[..., 3, 3]).abs().max()) > 1e-2
