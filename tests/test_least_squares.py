"""The closed-form start of PRE adaptors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune.graph.regions import AdaptorSite, Side
from fxprune.passes import Adaptor, InsertAdaptors
from fxprune.scoring.least_squares import solve_map, start_pre_adaptors
from tests.strategies import BlockSpec, NetSpec, image_batch


def rows(count: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64)


def test_a_known_map_is_recovered() -> None:
    source, wanted = rows(500, 6, 0), rows(6, 6, 1)
    found = solve_map(source, source @ wanted.T, ridge=0.0)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10)
    assert torch.allclose(solve_map(source, source @ wanted.T), wanted, rtol=0, atol=1e-2)


def test_nothing_to_change_gives_the_identity() -> None:
    source = rows(50, 6, 0)
    assert torch.allclose(solve_map(source, source), torch.eye(6).double(), rtol=0, atol=1e-12)


def test_the_ridge_pulls_towards_the_identity() -> None:
    source, wanted = rows(100, 6, 0), rows(6, 6, 1)
    eye = torch.eye(6, dtype=torch.float64)
    distances = [
        float((solve_map(source, source @ wanted.T, ridge=ridge) - eye).norm())
        for ridge in (0.0, 1e-2, 1.0, 1e2, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.1 < distances[0]


def test_the_ridge_is_relative_to_the_scale_of_the_features() -> None:
    source, wanted = rows(100, 6, 0), rows(6, 6, 1)
    one = solve_map(source, source @ wanted.T, ridge=0.1)
    other = solve_map(1e4 * source, 1e4 * source @ wanted.T, ridge=0.1)
    assert torch.allclose(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("source", [torch.zeros(20, 4), torch.ones(20, 4), rows(2, 4, 0).float()])
def test_degenerate_features_still_have_a_solution(source: Tensor) -> None:
    found = solve_map(source, source)
    assert torch.isfinite(found).all()
    assert torch.allclose(source.double() @ found.T, source.double(), atol=1e-5)


def test_the_solution_is_the_minimum() -> None:
    source, target, ridge = rows(100, 4, 0), rows(100, 4, 1), 0.3
    found = solve_map(source, target, ridge=ridge)
    scale = ridge * float((source.T @ source).diagonal().mean())

    def objective(map_: Tensor) -> float:
        return float((source @ map_.T - target).square().sum() + scale * (map_ - torch.eye(4)).square().sum())

    best = objective(found)
    for seed in range(20):
        assert objective(found + 1e-3 * rows(4, 4, seed)) > best


@torch.no_grad()
def test_one_walk_sets_each_adaptor_from_what_the_ones_before_it_yield() -> None:
    gm = fxprune.trace(NetSpec((4,), (), (), ((BlockSpec("basic"),) * 2,)).build(), image_batch())
    operators = ("stages_0_0_branch_0", "stages_0_1_branch_0")
    InsertAdaptors([AdaptorSite(name, Side.PRE, 4, 1) for name in operators])(gm)
    targets = {
        name: rows(6 * 64, 4, i).reshape(6, 8, 8, 4).movedim(-1, 1) for i, name in enumerate(operators)
    }
    start_pre_adaptors(gm, [image_batch(6)], targets)
    seen: list[Tensor] = []
    adaptors = [m for m in gm.modules() if isinstance(m, Adaptor)]
    for adaptor in adaptors:
        adaptor.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    gm(image_batch(6))
    for adaptor, source in zip(adaptors, seen, strict=True):
        target = targets[adaptor.site.operator]
        flat = [t.movedim(1, -1).reshape(-1, 4) for t in (source, target)]
        assert torch.allclose(adaptor.weight, solve_map(*flat), rtol=0, atol=1e-12)
        assert not torch.allclose(adaptor.weight, torch.eye(4, dtype=torch.float64), atol=1e-2)


@torch.no_grad()
def test_adaptors_without_a_target_stay_the_identity() -> None:
    gm = fxprune.trace(NetSpec((4,), (), (), ((BlockSpec("basic"),),)).build(), image_batch())
    InsertAdaptors([AdaptorSite("stages_0_0_branch_0", side, 4, 1) for side in Side])(gm)
    wrong = {"stages_0_0_branch_0": torch.zeros(6, 5, 8, 8)}  # another shape than what the operator reads
    for targets in ({}, wrong):
        start_pre_adaptors(gm, [image_batch(6)], targets)
        weights = [m.weight for m in gm.modules() if isinstance(m, Adaptor)]
        assert all(torch.equal(w, torch.eye(4, dtype=torch.float64)) for w in weights)
