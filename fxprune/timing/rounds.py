"""Taking turns against the clock, until the ratios are known well enough: the statistics behind latency.

Contestants are called in a drawn order, round by round, so that drift of the machine cancels within rounds;
what is compared are the ratios within rounds, with a bootstrap interval of their median. Knows neither torch
nor onnxruntime: what a call does, and how it is timed, comes from outside. Times are seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fxprune.errors import MeasurementError
from fxprune.measurements import Interval
from fxprune.validation import require

__all__ = [
    "Clock",
    "Contestant",
    "Samples",
    "TimingSettings",
    "by_round",
    "median_interval",
    "race",
    "ratio_over_processes",
    "ratios_by_round",
    "warm_up",
]

# A sample of several calls lasts at least this long, so that the clock's own cost and grain do not show.
_SAMPLE_S = 5e-3
_SHORT_CALL_S = 2e-3
# Bootstrapping after every round would cost more than small networks do; a tenth of the rounds done comes on top.
_ROUNDS_BETWEEN_CHECKS = 5

Times: TypeAlias = npt.NDArray[np.float64]
# Runs a call so many times and returns the seconds of one.
Clock: TypeAlias = "Callable[[Callable[[], object], int], float]"


@dataclass(frozen=True, slots=True)
class TimingSettings:
    """How long to measure, and when the result is good enough.

    Attributes:
        warmup: Calls of every network before the first timed one.
        min_rounds: Rounds in any case.
        max_rounds: Rounds at most.
        max_seconds: No further round starts after this time, once there were `min_rounds`.
        half_width: Half the interval of a ratio that is narrow enough in any case.
        relative: Half the interval over `|1 - ratio|`, the saving, that is narrow enough as well.
        level: Coverage of the interval.
        resamples: Bootstrap resamples.
        seed: Of the order within rounds and of the bootstrap.
        threads: Intra-operator threads on the CPU; `None` keeps torch's present number.

    Raises:
        OptionError: A value is out of range.
    """

    warmup: int = 5
    min_rounds: int = 15
    max_rounds: int = 200
    max_seconds: float = 20.0
    half_width: float = 0.01
    relative: float = 0.25
    level: float = 0.95
    resamples: int = 1000
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        rules = [
            *((name, getattr(self, name) >= 0, "give 0 or more") for name in ("warmup", "seed")),
            *((name, getattr(self, name) >= 1, "give 1 or more") for name in ("min_rounds", "resamples")),
            *((name, getattr(self, name) > 0, "give more than 0") for name in ("half_width", "relative")),
            ("max_seconds", self.max_seconds > 0, "give more than 0"),
            ("max_rounds", self.max_rounds >= self.min_rounds, f"give min_rounds={self.min_rounds} or more"),
            ("level", 0 < self.level < 1, "give a number between 0 and 1"),
            ("threads", self.threads is None or self.threads >= 1, "give 1 or more, or None"),
        ]
        require(self, rules)


@dataclass(slots=True)
class Contestant:
    """A prepared network and its samples, in seconds per call."""

    label: str
    call: Callable[[], object]
    repeats: int = 1
    samples: list[float] = field(default_factory=list)

    def take(self, clock: Clock) -> float:
        """Takes one sample, in seconds per call.

        Raises:
            MeasurementError: The call fails; names the contestant.
        """
        try:
            return clock(self.call, self.repeats)
        except Exception as error:  # the user's network may raise anything
            gist = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise MeasurementError(f"{self.label} could not be timed, a call failed: {gist}") from error


@dataclass(frozen=True, slots=True)
class Samples:
    """What one process measured of some networks, the reference first.

    Attributes:
        backend: Where they ran.
        device: On what, as its driver names it.
        threads: Intra-operator threads, 0 where that does not apply.
        repeats: For each network, the calls that made a sample.
        seconds: For each network, seconds per call, round by round.
        conditions: For each network, what its runtime was told, and what it says it does.
        card: The graphics card's clocks before and after all rounds; None on the CPU.
    """

    backend: str
    device: str
    threads: int
    repeats: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    conditions: tuple[Mapping[str, Any], ...] = ()
    card: Mapping[str, Any] | None = None


def median_interval(
    values: Sequence[float] | Times, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """The percentile bootstrap interval of a median (Efron 1979), from `resamples` draws with replacement."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, sample.size, size=(resamples, sample.size))
    low, high = np.quantile(np.median(sample[drawn], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def warm_up(contestants: Sequence[Contestant], clock: Clock, calls: int) -> None:
    """Lets caches fill and clocks rise, then chooses how many calls make a sample."""
    for contestant in contestants:
        for _ in range(calls):
            contestant.take(clock)
        once = contestant.take(clock)
        contestant.repeats = 1 if once >= _SHORT_CALL_S else math.ceil(_SAMPLE_S / max(once, 1e-7))


def race(
    contestants: Sequence[Contestant],
    clock: Clock,
    settings: TimingSettings,
    tell: Callable[[float], object] = lambda share: None,
) -> list[Interval]:
    """Takes rounds until every ratio is known well enough, or time is up.

    Args:
        contestants: The reference, and what is compared with it.
        clock: Takes a sample.
        settings: When to stop.
        tell: Called after every round with the share that it was of the longest possible race.
    """
    rng = np.random.default_rng(settings.seed)
    start = time.perf_counter()
    interval = partial(
        median_interval, level=settings.level, resamples=settings.resamples, seed=settings.seed
    )
    check, told = settings.min_rounds, 0.0
    for done in range(1, settings.max_rounds + 1):
        for index in rng.permutation(len(contestants)):
            contestants[index].samples.append(contestants[index].take(clock))
        share = max((time.perf_counter() - start) / settings.max_seconds, done / settings.max_rounds)
        before, told = told, min(share, 1.0)
        tell(told - before)
        if done >= settings.min_rounds and time.perf_counter() - start > settings.max_seconds:
            break
        if done < check:
            continue
        if all(_narrow(ratios, interval(ratios), settings) for ratios in ratios_by_round(contestants)):
            break
        check = done + _ROUNDS_BETWEEN_CHECKS + done // 10
    return [interval(ratios) for ratios in ratios_by_round(contestants)]


def _narrow(ratios: Times, interval: Interval, settings: TimingSettings) -> bool:
    """Whether more rounds would change neither the figure nor, when scoring, the order."""
    saving = abs(1.0 - float(np.median(ratios)))
    return interval.width / 2 < max(settings.half_width, settings.relative * saving)


def ratios_by_round(contestants: Sequence[Contestant]) -> list[Times]:
    """Candidate over reference, round by round."""
    return by_round([one.samples for one in contestants])


def by_round(seconds: Sequence[Sequence[float]]) -> list[Times]:
    """The same of samples alone, those of the reference first."""
    reference, *others = map(np.asarray, seconds)
    return [other / reference for other in others]


def ratio_over_processes(ratios: Sequence[Times], settings: TimingSettings) -> tuple[float, Interval]:
    """One ratio, and its interval, from the ratios by round of each of several processes, or of one.

    Where memory comes to lie and which algorithms are chosen differs from process to process and not within one, so
    processes are what is drawn at random, and few of them. To resample three of them would be too sure: it never
    leaves the range of their medians, which holds the true one in three cases of four. So the ratio is the geometric
    mean of the medians, with Student's interval of their logarithms, which is right for any number from two on (with
    three it is 4.3 standard errors wide to either side), and counts the noise within processes as well. By chance
    three medians may lie closer together than that noise lets one know them: the interval is never narrower than the
    one from resampling rounds within the processes.
    """
    if len(ratios) == 1:
        alone = median_interval(
            ratios[0], level=settings.level, resamples=settings.resamples, seed=settings.seed
        )
        return float(np.median(ratios[0])), alone
    logs = np.log([np.median(one) for one in ratios])
    mean, count = float(logs.mean()), len(logs)
    half = _student(settings.level, count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    rng = np.random.default_rng(settings.seed)
    drawn = [
        np.median(one[rng.integers(0, one.size, size=(settings.resamples, one.size))], axis=1)
        for one in ratios
    ]
    tails = [(1 - settings.level) / 2, (1 + settings.level) / 2]
    low, high = np.quantile(np.log(drawn).mean(axis=0), tails)
    bounds = math.exp(min(mean - half, low)), math.exp(max(mean + half, high))
    return math.exp(mean), Interval(*bounds, settings.level)


def _student(level: float, freedom: int) -> float:
    """How many standard errors to either side hold so large a share of Student's distribution."""
    # with t = sqrt(freedom) * tan(angle) its density is that of cos(angle) ** (freedom - 1)
    angles = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, share / share[-1], angles)))
