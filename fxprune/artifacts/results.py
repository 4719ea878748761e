"""The files of one run: all of one run or none, whatever ends it.

The old ones go before the first new one comes, their report first; a network is written as soon as there is one; the
report comes last and holds the SHA-256 of every file beside it: a folder with a report is whole.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fxprune.errors import AgreementError, ArtifactError, ExportError, FxpruneError
from fxprune.files import write_text_atomic

__all__ = ["SWEEP_FILES", "Results", "require_replaceable"]

logger = logging.getLogger(__name__)

SWEEP_FILES = ("sweep.json", "sweep.svg", "sweep_accuracy.svg")
"""What a sweep writes, its report first."""


class Results:
    """The files of one run in a folder; without a folder nothing is written.

    Args:
        folder: Where they go.
        report: Name of the report.
        names: Names of the files that may stand beside it.

    Attributes:
        failures: What could not be written, and why.
        notes: What is to be said of what was.
    """

    def __init__(self, folder: Path | None, report: str, names: Sequence[str]) -> None:
        self._folder, self._report, self._names = folder, report, tuple(names)
        self.failures: list[FxpruneError] = []
        self.notes: list[str] = []

    def begin(self) -> None:
        """Removes the files of the run before.

        Raises:
            ArtifactError: One cannot be removed.
        """
        if self._folder is None:
            return
        old = [self._folder / name for name in (self._report, *self._names)]
        try:
            for file in old:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise _in_the_way(error.filename, error) from error

    def write(self, make: Callable[[Path], object]) -> None:
        """Has files written into the folder; a failure is kept, so that the others are written all the same."""
        if self._folder is None:
            return
        try:
            make(self._folder)
        except (AgreementError, ArtifactError, ExportError) as error:
            logger.warning("%s", error)
            self.failures.append(error)

    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of every file that was written, by name."""
        if self._folder is None:
            return {}
        files = (self._folder / name for name in self._names)
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}

    def end(self, report: str) -> None:
        """Writes the report.

        Raises:
            ArtifactError: It cannot be written; the other files are there.
        """
        if self._folder is not None:
            write_text_atomic(self._folder / self._report, report)


def require_replaceable(folder: Path, names: Sequence[str], other: Path) -> None:
    """Refuses what would be in the way of results, before any work is done that would then be lost.

    Args:
        folder: Where results are to go.
        names: Of the results.
        other: Any folder on the same disk.

    Raises:
        ArtifactError: Something has such a name and cannot be removed.
    """
    for file in (folder / name for name in names):
        if file.is_dir() and not file.is_symlink():
            raise _in_the_way(file, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
        try:
            # no file takes the place of a folder, but one that must stay is refused for that reason first
            os.rename(file, other)
        except PermissionError as error:
            raise _in_the_way(file, error) from error
        except OSError:
            continue


def _in_the_way(file: str | Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"{file} is where a result goes and cannot be removed: {error.strerror}. Move it away, or name another folder"
    )
