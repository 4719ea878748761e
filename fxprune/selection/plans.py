"""Which regions to drop: scores (PRACTISE, eq. 3) and plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxprune.graph.regions import Region
from fxprune.measurements import CountComparison, LatencyComparison
from fxprune.notebook import html_table
from fxprune.validation import shortened

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

    def __repr__(self) -> str:
        return f"<DropPlan: {shortened(self.chosen) or 'none'}; chosen among {len(self.scores)} scores>"

    def _repr_html_(self) -> str:
        rows = [
            (
                "cut" if score.region.label in self.chosen else "",
                score.region.label,
                f"{score.recovery_loss:.4g}",
                f"{100 * score.cost.saving:.1f} %" if score.cost.distinguishable else "-",
                f"{score.score:.4g}" if math.isfinite(score.score) else "-",
            )
            for score in self.scores
        ]
        if not rows:
            rows = [("cut", label, "-", "-", "-") for label in self.chosen]
        headers = ("", "region", "recovery loss", "saves", "score")
        return html_table(f"{len(self.chosen)} regions to cut", headers, rows)


def largest_plan(regions: Sequence[Region]) -> tuple[Region, ...]:
    """The most regions that can be dropped together: none of them overlap.

    Regions nest or are disjoint, so taking the smallest first is optimal.
    """
    taken: list[Region] = []
    for region in sorted(regions, key=lambda r: len(r.body)):
        if not any(region.overlaps(other) for other in taken):
            taken.append(region)
    return tuple(taken)
