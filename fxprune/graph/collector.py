"""Python's cyclic garbage collector, out of the way while large graphs are walked."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the collector, if it is on, for a block or a decorated function that makes many objects and few cycles.

    A graph of 100,000 nodes is millions of objects, and the collector visits all of them again and again while more
    are made: a fifth of the time at 50,000 nodes. Reference counting goes on.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
