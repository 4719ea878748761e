"""Scorers and clocks that look into a store first, and keep there at once what they had to compute."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fxprune.graph.regions import Region
from fxprune.measurements import LatencyComparison
from fxprune.records import restored
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.scoring.scorer import Scorer, on_cpu
from fxprune.scoring.store import ScoreStore, content_of, question_of

__all__ = ["StoredScorer", "stored_latencies"]

logger = logging.getLogger(__name__)


class StoredScorer:
    """A scorer that looks into a store first, and keeps there what it computes, at once.

    Maps are returned on the CPU, whether computed or read.

    Args:
        scorer: Computes what is missing.
        store: Where finished fits are.

    Attributes:
        continues: As of the scorer.
        workers: As of the scorer.
    """

    def __init__(self, scorer: Scorer, store: ScoreStore) -> None:
        self._scorer, self._store = scorer, store
        self.continues, self.workers = scorer.continues, scorer.workers
        self._announced: list[list[Sequence[Region]]] = []
        self._lock = threading.Lock()

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
            return stored
        self._announce()
        fit = self._scorer.fit(regions, start)
        self._store.put(regions, fit, start)
        return on_cpu(fit)

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """The scorer's estimate, kept apart from fits: which of the two is known must not change a plan.

        Raises:
            ArtifactError: It was computed and cannot be written.
        """
        question = question_of(regions, start)
        loss: float | None = self._store.get_record("estimate", question)
        if loss is None:
            self._announce()
            loss = self._scorer.estimate(regions, start)
            self._store.put_record("estimate", question, loss)
        return loss

    def release(self) -> None:
        """Lets the scorer free its memory; the store stays."""
        self._scorer.release()

    def _announce(self) -> None:
        """Before a set is computed: what the scorer prepares for the first serves all, so the others wait for it."""
        with self._lock:
            while self._announced:
                self._scorer.prepare(self._announced.pop(0))


def stored_latencies(
    store: ScoreStore | None,
    sets: Sequence[Sequence[Region]],
    conditions: Mapping[str, Any],
    measure: Callable[[Sequence[Sequence[Region]]], Sequence[LatencyComparison]],
) -> tuple[LatencyComparison, ...]:
    """Latencies of the network without some sets of regions, measured once for all runs of one store.

    Noise must not change the plan of a run that goes on.

    Args:
        store: Where they are kept; None measures in any case.
        sets: What is left out each time.
        conditions: Backend, device, batch, threads, how long to go on: whatever else the figures depend on.
        measure: Called once, with the sets that no record answers.

    Returns:
        One comparison for each set, in their order.

    Raises:
        ArtifactError: They were measured and cannot be written.
    """
    if store is None:
        return tuple(measure(sets))
    contents = [{"without": content_of(regions), **conditions} for regions in sets]
    found = {i: _read(store, content) for i, content in enumerate(contents)}
    missing = [i for i, one in found.items() if one is None]
    measured = measure([sets[i] for i in missing]) if missing else ()
    for i, one in zip(missing, measured, strict=True):
        store.put_record("latency", contents[i], asdict(one))
        found[i] = one
    return tuple(one for one in found.values() if one is not None)


def _read(store: ScoreStore, content: Mapping[str, Any]) -> LatencyComparison | None:
    fields = store.get_record("latency", content)
    try:
        return None if fields is None else restored(LatencyComparison, fields)
    except ValueError as error:
        logger.warning("a latency that was kept cannot be read and is measured again: %s", error)
        return None
