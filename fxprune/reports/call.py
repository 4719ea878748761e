"""The call that repeats a compression, from the settings that its report holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fxprune.options import RECIPES, Options
from fxprune.records import plain

__all__ = ["call_of"]

_GIVEN = ("input_fn", "labels")
"""Settings of which a report holds no more than a name."""


def call_of(settings: Mapping[str, Any], *, evaluated: bool) -> str:
    """Python that asks for the same: every setting that is not the default, and in the caller's words what is not data.

    Args:
        settings: Of the report.
        evaluated: Whether there was an `evaluate`.
    """
    defaults = plain(Options().to_dict())
    given = ["model", "loader"]
    for name, default in defaults.items():
        value = settings.get(name, default)
        if name == "tap":  # a report holds the one that was found, which may be several nodes
            value = value[0] if value and len(value) == 1 else None
        if value != default and name != "progress":
            given.append(f"{name}={_written(name, value)}")
    if evaluated:
        given.append("evaluate=evaluate")
    arguments = "".join(f"    {argument},\n" for argument in given)
    return f"import fxprune\n\nsmall = fxprune.compress(\n{arguments})"


def _written(name: str, value: Any) -> str:
    if name == "recipe":
        known = [recipe.name for recipe in RECIPES.values() if plain(asdict(recipe)) == value]
        return repr(known[0]) if known else "recipe"
    return name if name in _GIVEN else repr(value)
