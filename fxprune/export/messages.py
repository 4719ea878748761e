"""What torch says, for users: without what it logs for its own developers, and in one line."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from fxprune.errors import FxpruneError

__all__ = ["innermost", "quiet"]

_LOGGERS = ("onnxscript", "torch.export", "torch._export", "torch.onnx")
_KNOWN_WARNINGS = (
    (UserWarning, r".*The axis name: .* will not be used"),  # several inputs share the batch dimension
    (UserWarning, r"The given buffer is not writable"),  # torch 2.9 never writes to it
    (UserWarning, r"Detected pickle protocol"),  # of damaged files
    (DeprecationWarning, r".*"),  # of torch, onnxscript and their dependencies among themselves
    (FutureWarning, r".*"),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings and tracebacks away that torch logs while it writes or reads a network; errors still raise."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for category, message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", category=category, message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def innermost(error: BaseException) -> str:
    """The first telling line of the exception that started the chain; torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (line if isinstance(error, FxpruneError) else f"{type(error).__name__}: {line}").rstrip(". ")
