"""fxprune: cut residual blocks out of trained vision networks, from a handful of unlabelled images.

The names below are loaded when they are first used, so that `import fxprune` and `fxprune --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxprune._version import __version__ as __version__

if TYPE_CHECKING:
    from fxprune import passes
    from fxprune.api import compress, export_onnx, in_own_class, load, measure, report, save, sweep
    from fxprune.discovery.discovery import discover
    from fxprune.errors import FxpruneError
    from fxprune.reading.read import from_onnx
    from fxprune.tracing.trace import trace

__all__ = [
    "FxpruneError",
    "compress",
    "discover",
    "export_onnx",
    "from_onnx",
    "in_own_class",
    "load",
    "measure",
    "passes",
    "report",
    "save",
    "sweep",
    "trace",
]

_HOME = {
    "FxpruneError": "fxprune.errors",
    "compress": "fxprune.api",
    "discover": "fxprune.discovery.discovery",
    "export_onnx": "fxprune.api",
    "from_onnx": "fxprune.reading.read",
    "in_own_class": "fxprune.api",
    "load": "fxprune.api",
    "measure": "fxprune.api",
    "report": "fxprune.api",
    "save": "fxprune.api",
    "sweep": "fxprune.api",
    "trace": "fxprune.tracing.trace",
}


def __getattr__(name: str) -> Any:
    if name == "passes":
        return import_module("fxprune.passes")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fxprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
