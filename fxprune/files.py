"""Files that are written whole or not at all, whatever ends the run: an error, SIGKILL, a full disk, no power.

What cannot be written is an `ArtifactError`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxprune.errors import ArtifactError

__all__ = [
    "check_writable",
    "remove_leftovers",
    "replacing",
    "replacing_folder",
    "replacing_with_company",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_text_atomic",
]

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\..+-(\d+)-[0-9a-f]{8}(\.\w+)?")
# So long after the last change to it a temporary is nobody's: if its process does not run here, and in any case.
_IDLE_S, _ABANDONED_S = 60.0, 24 * 3600.0


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Creates `folder` if need be, and proves that files can be written there, before any long work starts."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target) as probe:
            probe.write(b"fxprune")
    except OSError as error:
        raise ArtifactError(_describe(error, target)) from error
    remove_leftovers(target)
    return target


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.stem}-{os.getpid()}-{os.urandom(4).hex()}{target.suffix}")


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes the temporaries of runs that were killed; one that another process, or machine, may be at stays."""
    for path in Path(folder).glob(".*"):
        if found := _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                idle = time.time() - path.stat().st_mtime
                if idle > (_ABANDONED_S if _runs(int(found[1])) else _IDLE_S):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _runs(pid: int) -> bool:
    """Whether a process may be running on this machine."""
    if os.name == "nt":
        return True  # there, the call below would end it
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _sync(file: Path) -> None:
    """Has what was written reach the disk, so that files are whole after a power failure too."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _sync_entries(folder: Path) -> None:
    """Has the names in a folder reach the disk; some file systems cannot be asked for that."""
    with contextlib.suppress(OSError):
        entries = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place on success and vanishes on any exception."""
    target = Path(path)
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync_entries(target.parent)
    except OSError as error:
        raise ArtifactError(_describe(error, target)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_with_company(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path of the same name in a temporary folder: it and files written beside it take their places together.

    An old file at `path` goes before new company comes, so that it is never read with that of another.
    """
    target = Path(path)
    folder = _temporary(target)
    try:
        folder.mkdir()
        yield folder / target.name
        company = sorted(file for file in folder.iterdir() if file.name != target.name)
        for file in (*company, folder / target.name):
            _sync(file)
        if company:
            target.unlink(missing_ok=True)
        for file in (*company, folder / target.name):
            os.replace(file, target.parent / file.name)
        _sync_entries(target.parent)
    except OSError as error:
        raise ArtifactError(_describe(error, target)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], *, replace: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which takes its place on success and vanishes on any exception.

    An old folder at `path` stays as it is where it is not to be replaced, which is then an error. No system call
    exchanges two folders, so an old one is moved aside first; if the power fails just then, it lies beside `path`.
    """
    target = Path(path)
    temporary, aside = _temporary(target), target.with_name(f".{target.name}.replaced")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if replace and target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(target, aside)
        os.replace(temporary, target)
        _sync_entries(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if not target.exists() and aside.exists():
            os.replace(aside, target)
        raise ArtifactError(_describe(error, target)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    logger.debug("wrote %s (%d bytes)", path, len(data))


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as indented JSON, whole or not at all; numbers that are not finite are refused."""
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{os.fspath(path)} cannot be written: {error}") from error
    write_text_atomic(path, text + "\n")


def _describe(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written: the disk is full. Free some space, or name another folder"
    return f"{path} cannot be written: {error.strerror or error}. Name a folder that exists and is writable"
