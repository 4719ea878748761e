"""Scorers and clocks that look into a store first, and keep there what they had to compute."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from fxprune.graph.regions import Region
from fxprune.measurements import LatencyComparison
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.scoring.scorer import Scorer
from fxprune.scoring.store import ScoreStore, _hash

__all__ = ["StoredScorer", "stored_latency"]

logger = logging.getLogger(__name__)


class StoredScorer:
    """A scorer that looks into a store first, and keeps there what it computes, at once.

    Maps are returned on the CPU, whether computed or read.

    Args:
        scorer: Computes what is missing.
        store: Where finished fits are.

    Attributes:
        reused: Fits and estimates read from the store.
        computed: Those that had to be computed.
    """

    def __init__(self, scorer: Scorer, store: ScoreStore) -> None:
        self._scorer, self._store = scorer, store
        self._announced: list[list[Sequence[Region]]] = []
        self._lock = threading.Lock()
        self.reused = 0
        self.computed = 0

    @property
    def continues(self) -> bool:
        """Whether the scorer makes use of a start."""
        return self._scorer.continues

    @property
    def workers(self) -> int:
        """How many the scorer may have under way at once."""
        return self._scorer.workers

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Announces the sets to come; the scorer hears of them once one of them has to be computed."""
        # All of them then, finished or not: what a scorer prepares (which images fit its cache) may depend on the
        # whole list, and a resumed run must compute what the uninterrupted one would have.
        self._announced.append(list(sets))

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Looks a set up, or has it computed and keeps it.

        Raises:
            ArtifactError: It was computed and cannot be written.
        """
        stored = self._store.get(regions, start)
        if stored is not None:
            with self._lock:
                self.reused += 1
            return stored
        self._announce()
        fit = self._scorer.fit(regions, start)
        self._store.put(regions, fit, start)
        return replace(fit, maps={site: weights.cpu() for site, weights in fit.maps.items()})

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """The scorer's estimate, kept apart from fits: which of the two is known must not change a plan.

        Raises:
            ArtifactError: It was computed and cannot be written.
        """
        name = f"estimate-{_hash(regions, start)}"
        stored = self._store.get_record(name)
        if isinstance(stored, float):
            with self._lock:
                self.reused += 1
            return stored
        self._announce()
        loss = self._scorer.estimate(regions, start)
        self._store.put_record(name, loss)
        return loss

    def release(self) -> None:
        """Lets the scorer free its memory; the store stays."""
        self._scorer.release()

    def _announce(self) -> None:
        """Before a set is computed: what the scorer prepares for the first serves all, so the others wait for it."""
        with self._lock:
            self.computed += 1
            while self._announced:
                self._scorer.prepare(self._announced.pop(0))


def stored_latency(
    store: ScoreStore | None, name: str, measure: Callable[[], Sequence[LatencyComparison]]
) -> tuple[LatencyComparison, ...]:
    """Measured latencies, once for all runs of one store: noise must not change a resumed run's plan.

    Args:
        store: Where they are kept; None measures in any case.
        name: Of the record, see `ScoreStore.put_record`.
        measure: Called where there is no record.

    Raises:
        ArtifactError: They were measured and cannot be written.
    """
    found = None if store is None else store.get_record(name)
    if found is not None:
        try:
            return tuple(LatencyComparison.from_dict(fields) for fields in found)
        except (TypeError, KeyError) as error:
            logger.warning("the latencies kept as %r cannot be read and are measured again: %s", name, error)
    measured = tuple(measure())
    if store is not None:
        store.put_record(name, [asdict(comparison) for comparison in measured])
    return measured
