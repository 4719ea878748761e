"""What can tell how much a cut costs, and asking it about many cuts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from fxprune.graph.regions import Region
from fxprune.processes.group import share_out, world_size
from fxprune.processes.threads import side_by_side
from fxprune.progress import progress
from fxprune.recovery.adaptors import AdaptorFit

__all__ = ["Scorer", "SingleScorer", "fit_all", "on_cpu"]


class Scorer(Protocol):
    """Anything that can tell what dropping a set of regions costs."""

    @property
    def continues(self) -> bool:
        """Whether fits of a set's parts serve as a start; where not, they are ignored."""

    @property
    def workers(self) -> int:
        """How many sets may be fitted or estimated at once, from several threads."""

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Announces the sets to come, so that work can be shared."""

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        """Fits adaptors for one set and measures the loss, starting from fits of disjoint parts of it, if given."""

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """The loss of one set, as exactly as comparing many sets needs."""

    def release(self) -> None:
        """Gives memory back; what a later call needs of it is computed anew."""


class SingleScorer:
    """A scorer that begins every set anew: it shares nothing among them and holds nothing."""

    continues = False
    workers = 1
    fit: Callable[..., AdaptorFit]

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        """Nothing is shared."""

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        """As `fit`."""
        return self.fit(regions).loss

    def release(self) -> None:
        """Nothing is held."""


def fit_all(
    scorer: Scorer,
    sets: Sequence[Sequence[Region]],
    starts: Sequence[Sequence[AdaptorFit]] | None = None,
    *,
    show_progress: bool = False,
) -> list[AdaptorFit]:
    """Fits many sets of regions, each by one process, and as many at once there as its scorer may.

    Args:
        scorer: This process's own, made alike on every rank. What it keeps on disk is kept as it goes.
        sets: The same list on every rank.
        starts: Fits of parts of each set to begin at, the same on every rank.
        show_progress: Whether a bar is drawn.

    Returns:
        One fit for each set, in their order and the same on every rank; maps on the CPU where there are several.

    Raises:
        DistributedError: A process ended, or (on the others) its scorer failed.
    """
    scorer.prepare(sets)
    work = [partial(scorer.fit, *one) for one in zip(sets, starts or [()] * len(sets), strict=True)]

    def run(mine: Sequence[Callable[[], AdaptorFit]]) -> list[AdaptorFit]:
        with progress("scoring", len(mine), "cuts", show=show_progress) as tell:
            fits = side_by_side(mine, scorer.workers, lambda: tell(1))
        return fits if world_size() == 1 else [on_cpu(fit) for fit in fits]

    return share_out(work, run)


def on_cpu(fit: AdaptorFit) -> AdaptorFit:
    """The fit with its maps on the CPU."""
    return replace(fit, maps={site: weights.cpu() for site, weights in fit.maps.items()})
