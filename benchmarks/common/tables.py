"""Figures as means, spreads and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fxprune.reports.tables import render

__all__ = ["ACCURACY", "Columns", "mean_and_spread", "print_rows"]

Columns: TypeAlias = Mapping[str, str | tuple[str, float]]
"""By title the name of a figure, or the name and a factor."""
ACCURACY: Columns = {"top-1, %": ("accuracy", 100.0), "spread": ("accuracy_spread", 100.0)}


def mean_and_spread(values: Iterable[float | None]) -> tuple[float, float] | tuple[None, None]:
    """Returns the mean and the sample standard deviation (0 for one value) of what was measured, None for nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Columns) -> None:
    """Prints a table.

    Args:
        rows: Figures by name; what is missing is shown as a dash, what is a list with commas.
        columns: What to show.
    """
    cells = [[_cell(row, column) for column in columns.values()] for row in rows]
    print(render(tuple(columns), cells), flush=True)


def _cell(row: Mapping[str, Any], column: str | tuple[str, float]) -> Any:
    name, factor = (column, None) if isinstance(column, str) else column
    value = row.get(name)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return value if value is None or factor is None else factor * value
