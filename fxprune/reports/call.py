"""The call or the command that repeats a compression, from the settings that its report holds."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from fxprune.options import RECIPES, Options
from fxprune.records import plain

__all__ = ["SHELL_COMMAND", "call_of"]

SHELL_COMMAND: ContextVar[str | None] = ContextVar("SHELL_COMMAND", default=None)
"""What was typed in a shell to have what is under way; reports hold it among their settings (`command`)."""

_GIVEN = ("input_fn", "labels")
"""Settings of which a report holds no more than a name."""


def call_of(settings: Mapping[str, Any], *, evaluated: bool) -> str:
    """What asks for the same: the command that was typed, or Python.

    Python has every setting that is not the default, and in the caller's words what is not data.

    Args:
        settings: Of the report.
        evaluated: Whether there was an `evaluate`.
    """
    if "command" in settings:
        return str(settings["command"])
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
