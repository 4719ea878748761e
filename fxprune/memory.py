"""What to do when memory runs out, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fxprune.errors import FxpruneError, OutOfMemoryError

__all__ = ["memory_explained"]

_ALLOCATION = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Unable to allocate|could not create a (primitive|memory)"
    r"|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc"
)


@contextmanager
def memory_explained() -> Iterator[None]:
    """Tells what to do where memory runs out; torch, numpy and Python each raise something else then.

    Raises:
        OutOfMemoryError: In place of what they raise.
    """
    try:
        yield
    except FxpruneError as error:
        if isinstance(error, OutOfMemoryError) or not _ALLOCATION.search(str(error)):
            raise
        raise _explained(error) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _ALLOCATION.search(str(error)):
            raise
        raise _explained(error) from error


def _explained(error: Exception) -> OutOfMemoryError:
    gist = next(iter(str(error).splitlines()), "") or type(error).__name__
    return OutOfMemoryError(
        f"memory ran out ({gist}): smaller cache_bytes (--cache-mib), images (--images), latency_batch "
        "(--latency-batch) or smaller pictures need less; finished scores are kept where out (--out) was given"
    )
