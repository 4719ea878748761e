"""Records as plain data, and back: frozen dataclasses of numbers, words, tuples, mappings and each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

__all__ = ["plain", "restored"]

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Records as JSON takes them: enums by value or name, sets as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, Enum):
        return (
            value.name if type(value).__name__ == "Reason" else value.value
        )  # a reason's value is a sentence
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def restored(kind: type[T], value: Any) -> T:
    """The record of a type, from plain data; where null stands for a number, that one was not finite.

    Raises:
        ValueError: The data is none of such a record.
    """
    try:
        return cast("T", _restored(kind, value))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not the data of a {kind.__name__}: {error!r}") from error


def _restored(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None and NoneType in inner else _first(inner, value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {one.name: hints[one.name] for one in fields(kind) if one.name in value}
        return cast("Any", kind)(**{name: _restored(hint, value[name]) for name, hint in known.items()})
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_restored(one, part) for one, part in zip(kinds, value, strict=True))
    if origin is Mapping:
        return {name: _restored(inner[1], one) for name, one in value.items()}
    if origin is Literal:
        return inner[inner.index(value)]
    if issubclass(kind, Enum):
        return kind[value] if value in kind.__members__ else kind(value)
    if kind is float:
        return math.inf if value is None else float(value)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _first(kinds: Iterable[Any], value: Any) -> Any:
    """The value as the first of these types that it fits."""
    for kind in kinds:
        with suppress(TypeError, KeyError, AttributeError, ValueError):
            return _restored(kind, value)
    raise TypeError(f"{value!r} is of none of the types {', '.join(map(str, kinds))}")
