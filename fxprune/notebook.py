"""Short tables for notebooks: HTML in which everything that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["html_table"]

_MOST_ROWS = 40


def html_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table below its title; of many rows the first ones, and how many more there are."""
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        lines.append(f'<td colspan="{len(headers)}">and {len(rows) - _MOST_ROWS} more</td>')
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
