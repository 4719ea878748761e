"""Plain-text tables: columns aligned with spaces, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["render"]

_GAP = "  "


def render(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lays out rows below their headers.

    Floats are shown with four significant digits, None as a dash. A column in which every value is a number
    or None is aligned to the right.

    Args:
        headers: One title a column.
        rows: One value a column; converted by `str`.

    Returns:
        Lines without trailing spaces, joined by newlines: the headers, a rule, the rows.

    Raises:
        ValueError: A row has more or fewer values than there are headers.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} values for {len(headers)} headers: {tuple(row)}")
    cells = [[_text(value) for value in row] for row in rows]
    right = [_is_numeric([row[column] for row in rows]) for column in range(len(headers))]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(_GAP.join(map(_align, line, widths, right)).rstrip() for line in lines)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_numeric(values: Sequence[object]) -> bool:
    return any(value is not None for value in values) and all(
        value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values
    )


def _align(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
