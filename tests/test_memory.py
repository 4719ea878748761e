"""Large blocks of memory stay with the process while a job is open, and not while something is timed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import memory
from fxprune.errors import ExportError, MeasurementError, OutOfMemoryError
from fxprune.shell import cli
from fxprune.timing import latency
from fxprune.timing.rounds import Contestant
from tests.environments import ROOT
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


def in_fresh_process(check: Callable[[], None]) -> None:
    """Runs a check where nothing else has left large blocks free, which would be used again whatever is set."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    code = f"from tests import test_memory; test_memory.{check.__name__}()"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=own, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def blocks_while_memory_is_kept() -> None:
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
    os.environ["MALLOC_ARENA_MAX"] = "2"
    with memory.memory_kept():
        assert _is_mapped(LARGER)


def blocks_while_a_network_is_compressed() -> None:
    computing: list[bool] = []
    timing: list[bool] = []
    race = latency.race

    def watched(*args: Any) -> None:
        timing.append(_is_mapped(LARGER))
        race(*args)

    def measure(_: nn.Module) -> float:
        computing.append(_is_mapped())
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "race", watched)
        asked = {"regions": ["body.1"], "latency_batch": 1, "evaluate": measure, "progress": False}
        fxprune.compress(tiny(), images(), **asked)
    assert computing == [False, False]
    assert timing == [True]
    assert _is_mapped(LARGER)


@glibc
@pytest.mark.parametrize("check", [blocks_while_memory_is_kept, blocks_while_a_network_is_compressed])
def test_large_blocks_stay_while_a_job_computes_unless_the_user_sets_the_allocator_up(
    check: Callable[[], None],
) -> None:
    in_fresh_process(check)


def _called(error: Exception) -> MeasurementError:
    """What the clock makes of an error of a timed call."""

    def call() -> None:
        raise error

    with pytest.raises(MeasurementError) as caught:
        Contestant("candidate 1", call).take(lambda call, repeats: float(call() is None))
    return caught.value


RAN_OUT = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 EiB"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ExportError("m.onnx cannot be made: Unable to allocate 7.45 GiB for an array"),
    MeasurementError("candidate 1 could not be timed, a call failed: std::bad_alloc"),
    MeasurementError("scoring failed elsewhere: rank 1: MemoryError: "),
    _called(MemoryError()),
    _called(MemoryError("it says something else")),
]
OTHERWISE = [RuntimeError("a bug"), ExportError("no ONNX form"), _called(ValueError("too long"))]


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_whatever_says_that_memory_ran_out_brings_advice(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = r"memory ran out \(.+\): smaller cache_bytes"
    with pytest.raises(OutOfMemoryError, match=words), memory.memory_explained():
        raise error

    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_COMMANDS", (("inspect", cli.add_inspect, fail, ""),))
    assert cli.main(["inspect", "m"]) == 6
    assert "--cache-mib" in capsys.readouterr().err


@pytest.mark.parametrize("error", OTHERWISE, ids=str)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory.memory_explained():
        raise error
    assert caught.value is error
