"""Choosing sets of regions: independently, greedily with re-scoring, or exactly.

PRACTISE takes the k smallest scores, each judged alone. But two cuts in one stage share the same adaptors, so what a
set costs is not the sum of what its members cost. The joint score of a set is eq. 3 read for the set as a whole:
recovery loss with all its regions dropped, over the relative latency that they save together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.measurements import CountComparison, LatencyComparison
from fxprune.options import Selection
from fxprune.selection.plans import BlockScore, largest_plan

__all__ = ["EXACT_LIMIT", "Planner", "disjoint", "require_enough"]

EXACT_LIMIT = 512
"""Most sets that `exact` will score."""

SHRUNK = 0.85
"""Share of what a region added to a smaller set that it adds to a larger one, as far as `greedy` counts on it."""

SCORED_AGAIN = 4
"""Regions that `greedy` scores again at every step, at least."""

JointLoss = Callable[[Sequence[Sequence[Region]], Sequence[Region]], Sequence[float]]


def disjoint(regions: Sequence[Region]) -> bool:
    """Whether no two regions overlap."""
    return not any(a.overlaps(b) for a, b in combinations(regions, 2))


def require_enough(k: int, savings: Sequence[tuple[Region, LatencyComparison | CountComparison]]) -> None:
    """Refuses a `k` that is larger than the number of regions that save time and can be dropped together.

    Raises:
        OptionError: The message lists the regions whose saving is lost in the noise.
    """
    most = len(largest_plan([region for region, saving in savings if saving.distinguishable]))
    if k > most:
        slow = [region.label for region, saving in savings if not saving.distinguishable]
        raise OptionError(
            f"k is {k}, but only {most} regions can be dropped together and save time beyond the noise; no saving was "
            f"seen for: {', '.join(slow) or 'none'}. Ask for fewer, time a larger batch with latency_batch, run on a "
            "machine that does nothing else, choose by what is counted (cost='flops'), or name what to cut (regions)"
        )


class Planner:
    """Grows plans from scores.

    Args:
        scores: One for each region, in graph order.
        joint_loss: Recovery losses of some sets, and the plan that they all contain, in the order in which it grew;
            called for `greedy` and `exact` only.
        selection: How to choose.

    Attributes:
        scores: As given.
    """

    def __init__(self, scores: Sequence[BlockScore], joint_loss: JointLoss, selection: Selection) -> None:
        self.scores = tuple(scores)
        self._scores = {score.region.label: score for score in scores}
        self._order = {label: i for i, label in enumerate(self._scores)}
        self._joint_loss = joint_loss
        self._selection = selection
        self._usable = [s.region for s in scores if math.isfinite(s.score)]

    def saving(self, regions: Sequence[Region]) -> float:
        """What the regions save, relative, each measured or counted alone and added up."""
        return sum(self._scores[region.label].cost.saving for region in regions)

    def of_size(self, k: int) -> tuple[Region, ...]:
        """The plan with k regions, in graph order.

        Raises:
            OptionError: Fewer than k regions can be dropped together and save time beyond the noise.
        """
        require_enough(k, [(score.region, score.cost) for score in self.scores])
        if self._selection == "exact":
            return self._exact(k)
        plan: tuple[Region, ...] = ()
        for grown in self.path():
            plan = grown
            if len(plan) == k:
                return self._sorted(plan)
        raise OptionError(
            f"k is {k}, but the plan ended with {len(plan)} regions, because some contain others; ask for fewer, or "
            "use selection='exact'"
        )

    def path(self) -> Iterator[tuple[Region, ...]]:
        """Plans of 1, 2, 3 ... regions, each in graph order, each containing the one before it."""
        if self._selection == "exact":
            raise OptionError("selection='exact' has no path of growing plans; use 'greedy' or 'independent'")
        grow = self._independent if self._selection == "independent" else self._greedy
        yield from map(self._sorted, grow())

    def _independent(self) -> Iterator[tuple[Region, ...]]:
        plan: tuple[Region, ...] = ()
        for region in sorted(self._usable, key=lambda r: self._scores[r.label].score):
            if not any(region.overlaps(other) for other in plan):
                plan = (*plan, region)
                yield plan

    def _greedy(self) -> Iterator[tuple[Region, ...]]:
        """Lazy greedy: only the most promising regions are scored again.

        What a region adds to the loss of a set may fall when the set grows, mostly not below `SHRUNK` times what it
        added to an earlier, smaller set: so the others are those whose score would be too large even then. A cut in
        another stage can halve it, for its adaptors help; that is why at least `SCORED_AGAIN` take part.
        """
        plan: tuple[Region, ...] = ()
        loss = 0.0
        fresh: set[str] = set()  # those scored again for the present plan
        added = {region.label: self._scores[region.label].recovery_loss for region in self._usable}
        left = list(self._usable)

        def bound(region: Region) -> tuple[float, int]:
            """The joint score with one more region, or a lower bound of it; graph order decides between equals."""
            more = added[region.label] * (SHRUNK if plan and region.label not in fresh else 1.0)
            return (loss + more) / self.saving((*plan, region)), self._order[region.label]

        while left:
            if len(plan) == 1:
                # joint losses come from shorter fits than those of single regions: compare like with like
                loss = float(self._joint_loss([plan], ())[0])
            fresh.clear()
            best = min(left, key=bound)
            least = min(SCORED_AGAIN, len(left))
            while plan and (best.label not in fresh or len(fresh) < least):
                stale = sorted((region for region in left if region.label not in fresh), key=bound)
                again = stale[: max(1, least - len(fresh))]  # all that are due in any case at once
                losses = self._joint_loss([self._sorted((*plan, region)) for region in again], plan)
                added.update({r.label: float(whole) - loss for r, whole in zip(again, losses, strict=True)})
                fresh.update(region.label for region in again)
                best = min(left, key=bound)
            loss += added[best.label]
            plan = (*plan, best)
            left = [region for region in left if not region.overlaps(best)]
            yield plan

    def _exact(self, k: int) -> tuple[Region, ...]:
        count = math.comb(len(self._usable), k)
        if count > EXACT_LIMIT:
            raise OptionError(
                f"selection='exact' would score {count} sets of {k} regions, more than {EXACT_LIMIT}; use 'greedy'"
            )
        sets = [chosen for chosen in combinations(self._usable, k) if disjoint(chosen)]
        losses = self._joint_loss(sets, ())
        return min(zip(losses, sets, strict=True), key=lambda pair: pair[0] / self.saving(pair[1]))[1]

    def _sorted(self, plan: Sequence[Region]) -> tuple[Region, ...]:
        return tuple(sorted(plan, key=lambda region: self._order[region.label]))
