"""What people hear of long work: bars where somebody looks, lines in the log elsewhere, and nothing of short work."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

import fxprune
from fxprune import progress as module
from fxprune.progress import is_wanted, progress
from fxprune.timing.rounds import Contestant, TimingSettings, race
from tests.doubles import brief, comparison
from tests.tiny import images, tiny


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_bars_are_drawn_on_terminals_and_in_notebooks_unless_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    for terminal in (False, True):
        monkeypatch.setattr("os.isatty", lambda _, answer=terminal: answer)
        assert is_wanted(None) is terminal
        assert is_wanted(True) is True and is_wanted(False) is False
    monkeypatch.setattr("os.isatty", lambda _: False)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert is_wanted(None) is True


def test_without_a_bar_the_log_says_how_far_it_is(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fxprune.progress")
    with progress("scoring", 20, "cuts", show=False) as tell:
        for second in range(1, 16):
            clock.now = 2.0 * second
            tell(1)
    assert caplog.messages == [
        "scoring: 5 of 20 cuts, about 30 s left",
        "scoring: 10 of 20 cuts, about 20 s left",
        "scoring: 15 of 20 cuts, about 10 s left",
    ]


def test_a_bar_comes_after_two_seconds_and_leaves_the_log_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fxprune.progress")
    with progress("short", 2, "steps", show=True) as tell:
        tell(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "_QUIET_S", 0.0)
    monkeypatch.setattr(module, "_BETWEEN_LINES_S", 0.0)
    with progress("long", 4, "steps", show=True) as tell:
        tell(3)
    shown = capsys.readouterr().err
    assert "long:   0%" in shown and "/4" in shown
    assert caplog.messages == []


def test_every_stage_that_may_take_long_tells_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[tuple[float, list[float]]]] = {}

    @contextmanager
    def noted(title: str, total: float, unit: str, *, show: bool) -> Iterator[Callable[[float], None]]:
        assert show is True
        steps: list[float] = []
        told.setdefault(title, []).append((total, steps))
        yield steps.append

    for user in ("timing.latency", "scoring.scorer", "scoring.joint_losses"):
        monkeypatch.setattr(f"fxprune.{user}.progress", noted)
    monkeypatch.setattr("fxprune.recovery.training.told", noted)
    saved = [comparison(1.0, ratio) for ratio in (0.9, 0.8, 0.7, 0.6)]
    monkeypatch.setattr("fxprune.pipeline.stages.savings", lambda job: saved)
    quick = TimingSettings(min_rounds=2, max_rounds=2)
    monkeypatch.setattr("fxprune.timing.latency.TimingSettings", lambda: quick)
    fxprune.compress(tiny(), images(24), 2, recipe=brief(mimic=3), progress=True)
    ((total, shares),) = told.pop("latency, at most")
    assert sum(shares) == pytest.approx(total) and len(shares) == 2
    assert told.keys() == {"scoring", "selection", "at the tap"}
    assert [total for total, _ in told["scoring"]] == [4, 1]  # each alone, and the chosen ones together
    assert [total for total, _ in told["at the tap"]] == [3]
    assert all(sum(steps) == total for bars in told.values() for total, steps in bars)


def test_a_race_tells_its_share_of_the_longest_possible() -> None:
    shares: list[float] = []
    contestants = [Contestant(name, lambda: None) for name in ("before", "after")]
    race(contestants, lambda call, repeats: 1.0, TimingSettings(min_rounds=4, max_rounds=8), shares.append)
    assert shares == pytest.approx([1 / 8] * 4)
