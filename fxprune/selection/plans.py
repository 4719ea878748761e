"""Which regions to drop: scores (PRACTISE, eq. 3) and plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxprune.graph.regions import Region
from fxprune.measurements import CountComparison, LatencyComparison

__all__ = ["BlockScore", "DropPlan", "largest_plan"]


@dataclass(frozen=True, slots=True)
class BlockScore:
    """What dropping one region costs and saves.

    Attributes:
        region: The region.
        recovery_loss: Mean squared error left at the tap after the adaptors were fitted; lower is better.
        bare_loss: The same without adaptors.
        cost: The network without the region against the original: timed, or counted.
    """

    region: Region
    recovery_loss: float
    bare_loss: float
    cost: LatencyComparison | CountComparison

    @property
    def score(self) -> float:
        """Recovery loss over what is saved, relative; infinite where nothing is, or it is lost in the noise."""
        return self.recovery_loss / self.cost.saving if self.cost.distinguishable else math.inf

    @property
    def latency(self) -> LatencyComparison | None:
        """What was timed, None where the cost was counted."""
        return self.cost if isinstance(self.cost, LatencyComparison) else None


@dataclass(frozen=True, slots=True)
class DropPlan:
    """The chosen set and what it was chosen from.

    Attributes:
        scores: One for each region, in graph order.
        regions: The chosen regions, in graph order; none overlap.
        recovery_loss: Of the whole set, adaptors fitted together; None where it was not measured.
    """

    scores: tuple[BlockScore, ...]
    regions: tuple[Region, ...]
    recovery_loss: float | None = None

    @property
    def chosen(self) -> tuple[str, ...]:
        """Labels of the chosen regions."""
        return tuple(region.label for region in self.regions)


def largest_plan(regions: Sequence[Region]) -> tuple[Region, ...]:
    """The most regions that can be dropped together: none of them overlap.

    Regions nest or are disjoint, so taking the smallest first is optimal.
    """
    taken: list[Region] = []
    for region in sorted(regions, key=lambda r: len(r.body)):
        if not any(region.overlaps(other) for other in taken):
            taken.append(region)
    return tuple(taken)
