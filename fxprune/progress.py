"""How far long work has come, and how long it will still take: a bar in terminals and notebooks, lines in logs."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

__all__ = ["is_wanted", "progress"]

logger = logging.getLogger(__name__)

_QUIET_S = 2.0
"""Work that is done in less is not told of."""
_BETWEEN_LINES_S = 10.0


def is_wanted(asked: bool | None) -> bool:
    """Whether bars are drawn: as was asked, by default where somebody looks, on a terminal or in a notebook."""
    return (os.isatty(2) or "ipykernel" in sys.modules) if asked is None else asked


@contextmanager
def progress(title: str, total: float, unit: str, *, show: bool) -> Iterator[Callable[[float], None]]:
    """Tells of the work that a `with` block does; without a bar, the log gets a line now and then (level INFO).

    Args:
        title: What is done.
        total: How much, in units.
        unit: Of it.
        show: Whether a bar is drawn.

    Yields:
        A function to be called with the units that have been done since the last call, from any thread.
    """
    start = line = time.perf_counter()
    done = 0.0
    lock = threading.Lock()
    with tqdm(total=total, desc=title, unit=unit, delay=_QUIET_S, disable=not show, leave=False) as bar:

        def tell(more: float) -> None:
            nonlocal done, line
            with lock:
                done += more
                bar.update(more)
                now = time.perf_counter()
                if not show and now - line >= _BETWEEN_LINES_S:
                    line = now
                    left = (now - start) * (total - done) / done if done else float("nan")
                    logger.info("%s: %.0f of %.0f %s, about %.0f s left", title, done, total, unit, left)

        yield tell
