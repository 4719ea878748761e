"""Calls side by side: in order, on their share of the threads, and without a trace afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from fxprune.errors import OptionError
from fxprune.processes import threads
from fxprune.processes.threads import side_by_side, using_threads


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    with using_threads(4):
        yield


def present(barrier: threading.Barrier) -> tuple[int, str]:
    """Waits until all others are there, so that each call has a thread of its own."""
    barrier.wait(timeout=30)
    return torch.get_num_threads(), threading.current_thread().name


@pytest.mark.parametrize(("calls", "most", "at_once", "each"), [(2, 9, 2, 2), (8, 9, 4, 1), (6, 3, 3, 1)])
def test_threads_are_divided(calls: int, most: int, at_once: int, each: int) -> None:
    barrier = threading.Barrier(at_once)
    found = side_by_side([lambda: present(barrier)] * calls, most)
    assert {count for count, _ in found} == {each}
    assert len({name for _, name in found}) == at_once


@pytest.mark.parametrize(("calls", "most"), [(0, 2), (1, 2), (3, 1)])
def test_what_cannot_be_divided_runs_here_on_all_threads(calls: int, most: int) -> None:
    here = threading.current_thread().name
    found = side_by_side([lambda: (torch.get_num_threads(), threading.current_thread().name)] * calls, most)
    assert found == [(4, here)] * calls


def test_results_keep_their_order() -> None:
    first_may_end = threading.Event()

    def first() -> int:
        assert first_may_end.wait(timeout=30)
        return 0

    def last() -> int:
        first_may_end.set()
        return 2

    assert side_by_side([first, lambda: 1, last], 2) == [0, 1, 2]


def test_the_first_failure_ends_what_has_not_begun() -> None:
    begun: list[int] = []
    failing = threading.Event()

    def call(number: int) -> None:
        begun.append(number)
        if number == 0:
            failing.set()
            raise ValueError("the first")
        assert failing.wait(timeout=30)
        time.sleep(0.02)  # all of them would take ten seconds

    with pytest.raises(ValueError, match="the first"):
        side_by_side([partial(call, number) for number in range(500)], 2)
    assert len(begun) < 500
    assert torch.get_num_threads() == 4


def test_threads_begun_later_have_the_full_number() -> None:
    barrier = threading.Barrier(2)
    side_by_side([lambda: present(barrier)] * 2, 2)
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [4]
    assert torch.get_num_threads() == 4


def test_threads_are_given_back() -> None:
    with using_threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 4
    with pytest.raises(OptionError, match="threads is 0"), using_threads(0):
        pass


@pytest.mark.parametrize(
    ("cores", "groups", "files", "expected"),
    [
        (8, None, {}, 4),  # torch's own number is the least
        (3, None, {}, 3),
        (8, "0::/", {"cpu.max": "max 100000"}, 4),
        (8, "0::/", {"cpu.max": "200000 100000"}, 2),
        (8, "0::/", {"cpu.max": "250000 100000"}, 2),
        (8, "0::/", {"cpu.max": "50000 100000"}, 1),  # half a core
        (1, "0::/", {"cpu.max": "200000 100000"}, 1),
        (8, "0::/a.slice/b.service", {"a.slice/cpu.max": "300000 100000"}, 3),
        (8, "0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        (8, "0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        (8, "0::/told/outside", {"cpu.max": "200000 100000"}, 2),
        (
            8,
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            2,
        ),
        (8, "1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        (8, "3:cpuset:/", {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_no_more_threads_than_cores_by_affinity_and_by_the_control_groups_quotas(
    cores: int,
    groups: str | None,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(threads, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_MOUNTED", tmp_path / "mounted")
    if groups is not None:
        (tmp_path / "cgroup").write_text(f"{groups}\n")
    for name, text in files.items():
        file = tmp_path / "mounted" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert threads.default_threads() == expected
