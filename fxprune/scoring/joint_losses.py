"""Recovery losses of sets of regions, each begun where the fits of its parts ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from fxprune.graph.regions import Region
from fxprune.processes.threads import side_by_side
from fxprune.progress import progress
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.scoring.scorer import Scorer

__all__ = ["JointLosses"]


class JointLosses:
    """What a `Planner` asks for the losses of sets.

    Two cuts that share an adaptor want different things of it, and what a plan agreed on serves every set that grows
    from it: so a plan is fitted when it grows, once, and its sets begin there.

    Args:
        scorer: Estimates and fits.
        fits: Of every single region, by label.
        show_progress: Whether a bar is drawn.
    """

    def __init__(
        self, scorer: Scorer, fits: Mapping[str, AdaptorFit], *, show_progress: bool = False
    ) -> None:
        self._scorer, self._fits, self._show_progress = scorer, fits, show_progress
        self._plans: dict[frozenset[str], AdaptorFit] = {}

    def __call__(self, sets: Sequence[Sequence[Region]], plan: Sequence[Region]) -> list[float]:
        """Losses of some sets that contain `plan`, the regions taken so far in the order in which they were."""
        starts: list[list[AdaptorFit]] = [[] for _ in sets]
        if self._scorer.continues:
            grown = [self._fit(plan)] if plan else []
            taken = {region.label for region in plan}
            starts = [[*grown, *(self._fits[r.label] for r in s if r.label not in taken)] for s in sets]
        work = [partial(self._scorer.estimate, *one) for one in zip(sets, starts, strict=True)]
        with progress("selection", len(work), "sets", show=self._show_progress) as tell:
            return side_by_side(work, self._scorer.workers, lambda: tell(1))

    def _fit(self, plan: Sequence[Region]) -> AdaptorFit:
        if len(plan) == 1:
            return self._fits[plan[0].label]
        labels = frozenset(region.label for region in plan)
        if labels not in self._plans:
            parts = [self._fit(plan[:-1]), self._fits[plan[-1].label]]
            self._plans = {labels: self._scorer.fit(plan, parts)}  # the plan before it is not needed again
        return self._plans[labels]
