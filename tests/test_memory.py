"""Large blocks of memory stay with the process while a job is open, and not while something is timed."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import memory
from fxprune.timing import latency
from tests.tiny import images, tiny

LARGE = 2**26  # bytes
LARGER = 2**28  # for which what smaller blocks have left free is not enough


class _Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")] + [
        ("rest", ctypes.c_size_t * 5)
    ]


def _mapped() -> int:
    """Blocks that glibc has mapped by themselves."""
    counts = ctypes.CDLL(None).mallinfo2
    counts.restype = _Counts
    return int(counts().hblks)


def _is_mapped(size: int = LARGE) -> bool:
    """Whether a large tensor gets a block of its own from the system."""
    before = _mapped()
    tensor = torch.empty(size, dtype=torch.uint8)
    return _mapped() > before and tensor.nbytes == size


glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the allocator is not glibc's")


@pytest.fixture(autouse=True)
def _own_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)


@glibc
def test_large_blocks_stay_while_a_job_is_open() -> None:
    assert _is_mapped(LARGER)
    with memory.memory_kept():
        assert not _is_mapped()
        with memory.memory_kept():
            assert not _is_mapped()
        assert not _is_mapped()
        with memory.memory_returned():
            assert _is_mapped(LARGER)
        assert not _is_mapped()
    assert _is_mapped(LARGER)


@glibc
def test_nothing_changes_for_who_has_set_the_allocator_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with memory.memory_kept():
        assert _is_mapped(LARGER)


@glibc
def test_compress_computes_with_kept_memory_and_times_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    computing: list[bool] = []
    timing: list[bool] = []
    race = latency.race

    def watched(*args: Any) -> None:
        timing.append(_is_mapped(LARGER))
        race(*args)

    def measure(_: nn.Module) -> float:
        computing.append(_is_mapped())
        return 0.0

    monkeypatch.setattr(latency, "race", watched)
    fxprune.compress(tiny(), images(), regions=["body.1"], latency_batch=1, evaluate=measure, progress=False)
    assert computing == [False, False]
    assert timing == [True]
    assert _is_mapped(LARGER)
