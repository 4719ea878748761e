"""Refusing values that are out of range, by name and in words, before any work is done with them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import get_args

from fxprune.errors import OptionError

__all__ = [
    "TORCH_PRUNING",
    "folder",
    "is_number",
    "is_whole",
    "listed",
    "names",
    "one_of",
    "require",
    "shortened",
]

TORCH_PRUNING = {
    "ignored_layers": "ignore",
    "pruning_ratio": "k or target_speedup",
    "importance": "criterion",
    "iterative_steps": "sweep",
}
"""Words of torch-pruning, and ours for them."""


def require(owner: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Refuses a record with a field that is out of range.

    Args:
        owner: The record.
        rules: Name of a field, whether its value will do, and what would.

    Raises:
        OptionError: The first field that will not do, with its value.
    """
    for name, valid, wanted in rules:
        if not valid:
            raise OptionError(f"{name} is {getattr(owner, name)!r}; {wanted}")


def is_whole(value: object, least: int = 1, most: float = math.inf) -> bool:
    """Whether a value is a whole number in a range; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, above: float) -> bool:
    """Whether a value is a finite number above another."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < math.inf


def one_of(name: str, value: object, choices: object) -> tuple[str, bool, str]:
    """The rule that a field is one of a `Literal`'s choices."""
    return name, value in get_args(choices), listed(choices)


def listed(choices: object) -> str:
    """The choices of a `Literal`, as advice."""
    return f"choose from {', '.join(get_args(choices))}"


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def names(name: str, value: str | Iterable[str], what: str) -> tuple[str, ...]:
    """The names that an argument holds, of which there must be one or more.

    Args:
        name: Of the argument.
        value: What was given: one name, or several.
        what: They are, in words.

    Raises:
        OptionError: There are none, or something else.
    """
    found = (value,) if isinstance(value, str) else tuple(value)
    if not found or not all(isinstance(one, str) for one in found):
        raise OptionError(f"{name} is {value!r}; it must be {what}, at least one")
    return found


def folder(name: str, value: object) -> str:
    """The path of a folder that an argument holds.

    Raises:
        OptionError: It holds none.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str):
        raise OptionError(f"{name} is {value!r}; it must be the path of a folder")
    if not path or "\0" in path:
        raise OptionError(f"{name} is {path!r}; it must be the path of a folder, '.' for the present one")
    return path
