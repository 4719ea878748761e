"""The front of one sweep: latency against recovery loss for every number of dropped regions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fxprune.measurements import LatencyComparison
from fxprune.notebook import html_table
from fxprune.pictures.plots import front_svg
from fxprune.records import plain
from fxprune.reports.compression import entropy_lines, score_row
from fxprune.reports.tables import render
from fxprune.selection.plans import BlockScore

__all__ = ["SweepPoint", "SweepReport", "left_out"]


_HEADERS = ("k", "drops also", "ms", "latency ratio", "recovery loss", "accuracy")


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One plan on the path.

    Attributes:
        dropped: Labels of its regions.
        recovery_loss: Mean squared error at the tap, adaptors fitted together, before mimicking.
        latency: The network without them, against the original.
        accuracy: Of it with the adaptors folded in: top-1 on the user's `labels`, or what the user's `evaluate` said;
            None without either.
    """

    dropped: tuple[str, ...]
    recovery_loss: float
    latency: LatencyComparison
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class SweepReport:
    """All plans from one scoring.

    Attributes:
        points: Of 1, 2, 3 ... regions.
        scores: Of single regions.
        accuracy: The same of the original.
        labelled: Images that were given with `labels`, None without them.
        entropy: As in `CompressionReport`.
        settings: What was asked for.
        durations: Seconds that each stage took.
        versions: Of the software and the machine.
        notes: What the user should know.
        files: SHA-256 (hex) of the files that stand beside `sweep.json`, by name.
    """

    points: tuple[SweepPoint, ...]
    scores: tuple[BlockScore, ...]
    accuracy: float | None
    labelled: int | None
    entropy: float | None
    settings: Mapping[str, Any]
    durations: Mapping[str, float]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def plots(self) -> dict[str, str]:
        """The front by loss, and where there are accuracies by accuracy, from the original on: SVG by file name."""
        places = [1e3 * point.latency.after.median_s for point in self.points]
        labels = [f"k={len(point.dropped)}" for point in self.points]
        losses = [point.recovery_loss for point in self.points]
        spots = list(zip(places, losses, labels, strict=True))
        plots = {"sweep.svg": front_svg(spots, x_name="latency, ms", y_name="recovery loss")}
        if self.accuracy is not None:
            spots = [(1e3 * self.points[0].latency.before.median_s, self.accuracy, "original")]
            spots += [
                (place, point.accuracy, label)
                for place, point, label in zip(places, self.points, labels, strict=True)
                if point.accuracy is not None
            ]
            plots["sweep_accuracy.svg"] = front_svg(spots, x_name="latency, ms", y_name="accuracy")
        return plots

    def to_json(self) -> str:
        """Everything as JSON text."""
        data = plain(asdict(self)) | {"scores": [score_row(score) for score in self.scores]}
        return json.dumps(data, indent=1, allow_nan=False)

    def __repr__(self) -> str:
        return f"<SweepReport: {len(self.points)} plans of {len(self.scores)} regions>"

    def _repr_html_(self) -> str:
        return html_table("Every number of cuts", _HEADERS, self._rows())

    def _rows(self) -> list[list[str]]:
        rows = []
        for previous, point in zip(({}, *(set(p.dropped) for p in self.points)), self.points, strict=False):
            added = [label for label in point.dropped if label not in previous]
            latency = point.latency
            rows.append(
                [
                    str(len(point.dropped)),
                    ", ".join(added),
                    f"{1e3 * latency.after.median_s:.3f}",
                    f"{latency.ratio:.3f} [{latency.interval.low:.3f}, {latency.interval.high:.3f}]",
                    f"{point.recovery_loss:.4g}",
                    "-" if point.accuracy is None else f"{100 * point.accuracy:.2f} %",
                ]
            )
        return rows

    def __str__(self) -> str:
        lines: list[str] = []
        if self.accuracy is not None:
            where = "" if self.labelled is None else f", top-1 on {self.labelled} labelled images"
            lines.append(f"accuracy of the original {100 * self.accuracy:.2f} %{where}")
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([render(_HEADERS, self._rows()), *lines, *entropy_lines(self.entropy), *notes])


def left_out(scores: Sequence[BlockScore]) -> tuple[str, ...]:
    """A note on the regions that no plan of a sweep holds because they save nothing; none where there are no such."""
    useless = [score.region.label for score in scores if not score.cost.distinguishable]
    if not useless:
        return ()
    return (
        f"left out, as no saving was seen beyond the noise: {', '.join(useless)}. A larger batch (latency_batch), a "
        "machine that does nothing else or cost='flops' may tell; compress(regions=) cuts what is named all the same",
    )
