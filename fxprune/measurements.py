"""What was measured: immutable records, each able to say on what machine part and with which spread.

They lie below every layer because scoring, timing and reporting all speak them. Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CountComparison", "Interval", "Latency", "LatencyComparison"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval.

    Attributes:
        low: Lower bound.
        high: Upper bound.
        level: Coverage, for instance 0.95.
    """

    low: float
    high: float
    level: float = 0.95

    @property
    def width(self) -> float:
        """Distance between the bounds."""
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Latency:
    """The time of one forward call.

    Attributes:
        backend: What ran it, one of `backends.BACKENDS`.
        device: The device as its driver names it.
        batch_shape: Shape of the (first) input.
        threads: Intra-operator threads, 0 where it does not apply.
        median_s: Median over `runs`, in seconds.
        p95_s: 95th percentile, in seconds.
        iqr_s: Interquartile range, in seconds.
        runs: Timed calls, warm-up excluded.
        quantiles_s: The fastest call, then every 5 %, up to the slowest, in seconds.
        p90_s: 90th percentile, in seconds.
        p99_s: 99th percentile, likewise.
    """

    backend: str
    device: str
    batch_shape: tuple[int, ...]
    threads: int
    median_s: float
    p95_s: float
    iqr_s: float
    runs: int
    quantiles_s: tuple[float, ...] = ()
    p90_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True, slots=True)
class LatencyComparison:
    """Two networks timed alternately, in one process or in each of several.

    Attributes:
        before: The reference.
        after: The candidate.
        ratio: Median over the pairs of `after / before`; below 1 means faster.
        interval: Its interval, which comes from resampling rounds, and over processes if there were several.
        shared_by: How many equal regions `after` lacks; where more than one, `ratio` and `interval` are those of an
            equal share of the difference.
        by_process: The median in each process where there were several, the ratio then being their geometric mean.
    """

    before: Latency
    after: Latency
    ratio: float
    interval: Interval
    shared_by: int = 1
    by_process: tuple[float, ...] = ()

    @property
    def saved_s(self) -> float:
        """Seconds saved per call: `before.median_s * (1 - ratio)`, so that drift cancels within pairs."""
        return self.before.median_s * (1.0 - self.ratio)

    @property
    def saving(self) -> float:
        """Relative latency saved, PRACTISE eq. 2: `(before - after) / before`."""
        return 1.0 - self.ratio

    @property
    def distinguishable(self) -> bool:
        """Whether the candidate is faster beyond the noise: the whole interval lies below 1."""
        return self.interval.high < 1.0

    @property
    def verdict(self) -> str:
        """`faster` or `slower` where the whole interval lies to that side of 1."""
        return (
            "faster"
            if self.distinguishable
            else "slower"
            if self.interval.low > 1.0
            else "no difference seen"
        )


@dataclass(frozen=True, slots=True)
class CountComparison:
    """What two networks need, counted instead of timed.

    Attributes:
        unit: What was counted: `flops`, of one image, or `parameters`.
        before: Of the reference.
        after: Of the candidate.
    """

    unit: str
    before: int
    after: int

    @property
    def saving(self) -> float:
        """The share that is saved: `(before - after) / before`."""
        return 1.0 - self.after / self.before

    @property
    def distinguishable(self) -> bool:
        """Whether the candidate needs less; a count has no noise."""
        return self.after < self.before
