"""Memory: what to do when it runs out, in words; and large blocks that stay with the process while it works."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fxprune.errors import FxpruneError, OutOfMemoryError

__all__ = ["memory_explained", "memory_kept", "memory_returned"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # glibc's malloc.h
# with more than one arena, those of other threads map every large block
_KEPT = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1}
# glibc moves its own thresholds, up to these once a large block was freed
_RETURNED = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _ARENA_MAX: 0}

# by name too, for of other processes' errors there is but the text
_ALLOCATION = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Unable to allocate|could not create a (primitive|memory)"
    r"|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc|MemoryError"
)


@contextmanager
def memory_explained() -> Iterator[None]:
    """Tells what to do where memory runs out; torch, numpy and Python each raise something else then.

    Raises:
        OutOfMemoryError: In place of what they raise.
    """
    try:
        yield
    except (FxpruneError, MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not _ran_out(error):
            raise
        raise _explained(error) from error


def _ran_out(error: BaseException) -> bool:
    """Whether memory is what an error is about, or what it was made from: a `MemoryError` may say nothing."""
    if isinstance(error, MemoryError) or _ALLOCATION.search(str(error)):
        return True
    return error.__cause__ is not None and _ran_out(error.__cause__)


def _explained(error: Exception) -> OutOfMemoryError:
    gist = next(iter(str(error).splitlines()), "") or type(error).__name__
    return OutOfMemoryError(
        f"memory ran out ({gist}): smaller cache_bytes (--cache-mib), images (--images), latency_batch "
        "(--latency-batch) or smaller pictures need less; finished scores are kept where out (--out) was given"
    )


class _Keepers:
    """How many `memory_kept` are under way in this process, for what they set holds for all of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0


_keepers = _Keepers()


@contextmanager
def memory_kept() -> Iterator[None]:
    """Large blocks that are freed stay with the process in a `with` block, to be used again.

    glibc maps every block above 32 MiB anew and gives it back when it is freed, and the system fills each of its pages
    with zeros at first touch: for the activations of large images that takes longer than to compute them. Memory that
    is free goes back at the end. Nothing happens without glibc, or where the user has set its allocator up.
    """
    with _keepers.lock:
        _keepers.count += 1
        if _keepers.count == 1:
            _set(_KEPT)
    try:
        yield
    finally:
        with _keepers.lock:
            _keepers.count -= 1
            if not _keepers.count:
                _set(_RETURNED)


@contextmanager
def memory_returned() -> Iterator[None]:
    """What is timed in a `with` block allocates as in any other process, within `memory_kept` too.

    All but: what long work before it has left free in the middle of the heap is used again all the same.
    """
    with _keepers.lock:
        if _keepers.count:
            _set(_RETURNED)
    try:
        yield
    finally:
        with _keepers.lock:
            if _keepers.count:
                _set(_KEPT)


def _set(values: Mapping[int, int]) -> None:
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library, or none that can be asked
        return
    for parameter, value in values.items():
        mallopt(parameter, value)
    if values is _RETURNED:
        trim(0)
