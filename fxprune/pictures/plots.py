"""A scatter of latency against recovery loss, as SVG text, so that no plotting library is needed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["front_svg"]

_WIDTH, _HEIGHT, _MARGIN = 640, 400, 60


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def front_svg(points: Sequence[tuple[float, float, str]], *, x_name: str, y_name: str) -> str:
    """Draws a front.

    Args:
        points: `(x, y, label)` in drawing order; at least one.
        x_name: What `x` is, with its unit.
        y_name: What `y` is, with its unit.

    Returns:
        A complete SVG document.
    """
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1.0
    y_low, y_high = min(0.0, *ys), max(ys) if max(ys) > 0 else 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = _MARGIN + (x - x_low) / (x_high - x_low) * (_WIDTH - 2 * _MARGIN)
        down = _HEIGHT - _MARGIN - (y - y_low) / (y_high - y_low) * (_HEIGHT - 2 * _MARGIN)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in _ticks(x_low, x_high):
        x, y = place(tick, y_low)
        parts.append(f'<line x1="{x}" y1="{_MARGIN}" x2="{x}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{tick:.3g}</text>')
    for tick in _ticks(y_low, y_high):
        x, y = place(x_low, tick)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{_WIDTH - _MARGIN}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{tick:.3g}</text>')
    line = " ".join(",".join(map(str, place(x, y))) for x, y, _ in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    for x, y, label in points:
        across, down = place(x, y)
        parts.append(f'<circle cx="{across}" cy="{down}" r="4" fill="#1f6feb"/>')
        parts.append(f'<text x="{across + 6}" y="{down - 6}">{escape(label)}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
