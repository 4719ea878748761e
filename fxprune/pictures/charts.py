"""Geometry of the page's charts: where lines, ticks and dots go, in the units of an SVG's viewBox."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.measurements import Latency, LatencyComparison
from fxprune.recovery.mimicking import Mimicking

__all__ = ["HEIGHT", "WIDTH", "Curve", "Hill", "Recovery", "Tick", "latency_hills", "recovery_curves"]

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 40
_BINS = 48


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: where it is, and what it says."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Hill:
    """How the calls of one network are spread over time.

    Attributes:
        path: Outline of the histogram.
        median: Where the median lies.
        latency: What it was drawn from.
    """

    path: str
    median: float
    latency: Latency


@dataclass(frozen=True, slots=True)
class Curve:
    """The errors of one attempt.

    Attributes:
        points: Where its looks lie, for a polyline; those that are not finite are left out.
        best: Where the best state lies; None on attempts that left none.
    """

    points: str
    best: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Recovery:
    """All attempts of one fit.

    Attributes:
        curves: In the order of the attempts.
        x_ticks: Steps.
        y_ticks: Errors.
        logarithmic: Whether equal distances upwards mean equal ratios.
    """

    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    logarithmic: bool


def latency_hills(measured: LatencyComparison) -> tuple[tuple[Hill, Hill], tuple[Tick, ...]] | None:
    """The original above the compressed network, up to what 95 % of the slower one's calls take, and an axis in ms.

    None where the spread was not kept.
    """
    both = (measured.before, measured.after)
    if not all(one.quantiles_s for one in both):
        return None
    low = min(one.quantiles_s[0] for one in both)
    high = max(max(one.p95_s for one in both), low * 1.001)
    edges = np.linspace(low, high, _BINS + 1)
    x = _scale(low, high, _LEFT, WIDTH - _RIGHT)
    shares = [
        np.diff(np.interp(edges, one.quantiles_s, np.linspace(0, 1, len(one.quantiles_s)))) for one in both
    ]
    room = (HEIGHT - _TOP - _BOTTOM) / 2
    tallest = max(float(share.max()) for share in shares) or 1.0
    hills = []
    for row, (one, share) in enumerate(zip(both, shares, strict=True)):
        ground = _TOP + room * (row + 1)
        steps = [f"M{x(low):.1f} {ground:.1f}"]
        for left, right, part in zip(edges[:-1], edges[1:], share, strict=True):
            top = ground - (room - 8) * float(part) / tallest
            steps.append(f"L{x(left):.1f} {top:.1f}L{x(right):.1f} {top:.1f}")
        hills.append(Hill("".join([*steps, f"L{x(high):.1f} {ground:.1f}Z"]), round(x(one.median_s), 1), one))
    ticks = tuple(
        Tick(round(x(value / 1e3), 1), f"{value:g}") for value in _round_values(1e3 * low, 1e3 * high)
    )
    return (hills[0], hills[1]), ticks


def recovery_curves(fit: Mimicking) -> Recovery | None:
    """The errors of a fit's attempts over their steps; None where no attempt was looked at on its way."""
    seen = [error for attempt in fit.attempts for _, error in attempt.looks if math.isfinite(error)]
    if max(len(attempt.looks) for attempt in fit.attempts) < 3 or not seen:
        return None
    last = max(step for attempt in fit.attempts for step, _ in attempt.looks) or 1
    low, high = min(seen), max(seen)
    logarithmic = low > 0 and high > 4 * low
    place = math.log if logarithmic else float
    margin = 0.06 * (place(high) - place(low)) or 0.5 * abs(place(high)) or 1.0
    x = _scale(0, last, _LEFT, WIDTH - _RIGHT)
    up = _scale(place(low) - margin, place(high) + margin, HEIGHT - _BOTTOM, _TOP)

    def spot(step: int, error: float) -> tuple[float, float]:
        return round(x(step), 1), round(up(place(error)), 1)

    curves = []
    for attempt in fit.attempts:
        spots = {step: spot(step, error) for step, error in attempt.looks if math.isfinite(error)}
        best = spots.get(fit.best) if attempt is fit.last and fit.best else None
        curves.append(Curve(" ".join(f"{x},{y}" for x, y in spots.values()), best))
    steps = tuple(Tick(round(x(value), 1), f"{value:g}") for value in _round_values(0, last))
    values = _powers(low, high) if logarithmic else _round_values(low, high)
    errors = tuple(Tick(round(up(place(value)), 1), f"{value:.4g}") for value in values)
    return Recovery(tuple(curves), steps, errors, logarithmic)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _round_values(low: float, high: float) -> Sequence[float]:
    """Some five multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> Sequence[float]:
    """Some 1, 2 and 5 times powers of ten; the ends where there are none between them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high > 1000 * low else (1, 2, 5)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in values if low <= value <= high] or [low, high]
