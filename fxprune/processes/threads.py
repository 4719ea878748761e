"""Independent pieces of work side by side, each on its share of torch's threads.

The steps of a scorer are small: eight images through one operator after another keep many threads waiting for each
other rather than busy. Candidates know nothing of each other, so several of them on fewer threads each end sooner.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from fxprune.errors import OptionError

__all__ = ["default_threads", "side_by_side", "using_threads"]

T = TypeVar("T")

_GROUPS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads for a while, for the thread that asks; onnxruntime takes the same.

    Raises:
        OptionError: The number is below 1.
    """
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise OptionError(f"threads is {count}; it must be 1 or more")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_threads() -> int:
    """Torch's present number of threads, or as many as this process may use cores if those are fewer.

    Both its affinity counts and the processor time that its control groups, of either version, are given.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), cores, *(max(1, int(quota)) for quota in _quotas()))


def _quotas() -> Iterator[float]:
    """Cores' worth of processor time that each control group around this process is given, where it has a limit."""
    with contextlib.suppress(OSError):  # no control groups here
        for line in _GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mounted, parts = _MOUNTED / controllers, Path(path).parts[1:]
            for depth in range(len(parts) + 1):  # the root too, for a container may be told its path outside
                with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
                    yield _quota(mounted.joinpath(*parts[:depth]), first_version=bool(controllers))


def _quota(group: Path, *, first_version: bool) -> float:
    """The cores' worth of a group.

    Raises:
        OSError: It is none.
        ValueError: It has no limit.
    """
    if first_version:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    else:
        quota, period = map(int, (group / "cpu.max").read_text().split())  # "max" is no number
    if quota < 0:
        raise ValueError("no limit")
    return quota / period


def side_by_side(
    work: Sequence[Callable[[], T]], most: int, done: Callable[[], object] = lambda: None
) -> list[T]:
    """The results of some calls, in their order.

    How torch's threads are divided depends on the number of calls, never on how long they take: a call that finds its
    result on disk leaves the others what they have, so that a resumed run computes what the first one would have.

    Args:
        work: Calls that may run at once.
        most: So many at a time, at most; no more than torch has threads.
        done: Called whenever one of them has ended, from its thread.

    Raises:
        Exception: What the first call that failed raised, once those under way have ended; no further one begins.
    """

    def run(call: Callable[[], T]) -> T:
        result = call()
        done()
        return result

    threads = torch.get_num_threads()
    count = min(most, threads, len(work))
    if count < 2:
        return [run(call) for call in work]
    pool = ThreadPoolExecutor(count, "fxprune", torch.set_num_threads, (threads // count,))
    try:
        return [result.result() for result in [pool.submit(run, call) for call in work]]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the pool's number would be that of every thread begun from now on
