"""Stand-ins that make a test of `compress` quick and repeatable: latencies counted instead of measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fxprune.measurements import Interval, Latency, LatencyComparison
from fxprune.options import RECIPES, Recipe

__all__ = ["brief", "comparison", "count_latency", "forbid_work"]


def comparison(
    before_s: float, after_s: float, *, spread: float = 1e-3, batch: tuple[int, ...] = (8, 3, 16, 16)
) -> LatencyComparison:
    """A comparison of two latencies, in whatever unit, whose interval is `ratio` +- `spread`."""

    def latency(seconds: float) -> Latency:
        return Latency("torch", "counted", batch, 1, seconds, seconds, 0.0, 10)

    ratio = after_s / before_s
    return LatencyComparison(
        latency(before_s), latency(after_s), ratio, Interval(ratio - spread, ratio + spread)
    )


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets neither timing nor fitting begin."""

    def stop(*args: object, **options: object) -> None:
        raise AssertionError("work began before what was given was checked")

    for name in (
        "fxprune.timing.latency.compare",
        "fxprune.scoring.cached.CachedScorer.fit",
        "fxprune.scoring.cached.CachedScorer.prepare",
    ):
        monkeypatch.setattr(name, stop)


def _cost(network: object) -> float:
    if isinstance(network, Path):
        return 1e-6 * network.stat().st_size
    assert isinstance(network, nn.Module)
    return 1e-6 * (1 + sum(p.numel() for p in network.parameters()))


def count_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets latency be the number of parameters, or a file's bytes, in microseconds, wherever networks are compared."""

    def compare(
        before: object, candidates: Sequence[object], inputs: Sequence[Tensor], **rest: Any
    ) -> tuple[LatencyComparison, ...]:
        shape = tuple(inputs[0].shape)
        return tuple(comparison(_cost(before), _cost(c), batch=shape) for c in candidates)

    monkeypatch.setattr("fxprune.timing.latency.compare", compare)


def brief(name: str = "fast", *, adaptor: int = 1, mimic: int = 1, final: int = 0) -> Recipe:
    """A known recipe, cut down to a few iterations, by default without those on all images."""
    recipe = RECIPES[name]
    return replace(
        recipe,
        adaptor=replace(recipe.adaptor, iterations=adaptor, batch_size=4),
        mimic=replace(recipe.mimic, iterations=mimic, batch_size=4, final_iterations=final),
    )
