"""Exit codes of the commands: why one ended, for scripts; docs/pipelines.md lists them."""

from __future__ import annotations

from fxprune import errors

__all__ = ["INTERRUPTED", "exit_code"]

INTERRUPTED = 130
"""What shells give a command that Ctrl-C ended."""

_OTHER = 1
# The first that fits counts.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.TargetError, 3),
    (errors.AgreementError, 4),
    (errors.ParityError, 5),
    (errors.OutOfMemoryError, 6),
    (errors.OptionError, 2),
    (errors.SourceError, 2),
    (errors.CalibrationError, 2),
)


def exit_code(error: BaseException) -> int:
    """The code that tells what kind of error ended a command."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), _OTHER)
