"""The report of one compression as a page: one file that loads nothing, made from what `report.json` holds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fxprune.measurements import Interval
from fxprune.pictures.charts import HEIGHT, WIDTH, latency_hills, recovery_curves
from fxprune.reports.call import call_of
from fxprune.reports.compression import CompressionReport
from fxprune.reports.layout import Place
from fxprune.selection.plans import BlockScore

__all__ = ["PAGE", "page"]

PAGE = "report.html"
"""Its name in a folder of results."""

_SHADES = 5
"""Colours that a score may have, from the cheapest cuts to the dearest."""


@dataclass(frozen=True, slots=True)
class Row:
    """A region in the table.

    Attributes:
        score: What was measured.
        label: Of the region.
        cut: Whether it was cut.
        why_not: Why it was kept, empty for one that was cut.
        saved_ms: What the milliseconds saved may be; None where nothing was timed.
        saving: What the per cent saved may be.
        costs: What the recovery loss over the share saved may be; infinite where the saving is lost in noise.
        shade: Colour of its score, None without one.
    """

    score: BlockScore
    label: str
    cut: bool
    why_not: str
    saved_ms: Interval | None
    saving: Interval
    costs: Interval
    shade: int | None


def page(report: CompressionReport) -> str:
    """The whole page, the same for the same report, whether it was just made or read from `report.json`."""
    report = CompressionReport.from_json(report.to_json())
    files = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = _rows(report)
    return environment.get_template("page.html.j2").render(
        report=report,
        rows=rows,
        stages=list(_stages(report.layout, report.plan.chosen, rows)),
        shades=_SHADES,
        refused=_refused(report),
        fits=[(fit, recovery_curves(fit)) for fit in report.mimicking],
        settings=[(n, json.dumps(v)) for n, v in sorted(report.settings.items()) if v is not None],
        hills=latency_hills(report.latency),
        width=WIDTH,
        height=HEIGHT,
        call=call_of(report.settings, evaluated=report.evaluation is not None),
        isfinite=math.isfinite,
        page=PAGE,
    )


def _rows(report: CompressionReport) -> list[Row]:
    shades = _shades([score.score for score in report.plan.scores])
    rows = []
    for score, shade in zip(report.plan.scores, shades, strict=True):
        timed, label = score.latency, score.region.label
        low = high = score.cost.saving
        saved_ms = None
        if timed is not None:
            low, high = 1 - timed.interval.high, 1 - timed.interval.low
            whole = 1e3 * timed.before.median_s
            saved_ms = Interval(whole * low, whole * high)
        dear = score.recovery_loss / low if low > 0 else math.inf
        cheap = score.recovery_loss / high if high > 0 else math.inf
        cut = label in report.plan.chosen
        rows.append(
            Row(
                score,
                label,
                cut,
                "" if cut else _why_not(report, score),
                saved_ms,
                Interval(100 * low, 100 * high),
                Interval(cheap, dear),
                shade,
            )
        )
    return rows


def _why_not(report: CompressionReport, score: BlockScore) -> str:
    chosen = [region for region in report.plan.regions if region.overlaps(score.region)]
    if chosen:
        return f"overlaps {chosen[0].label}, which is cut"
    if not score.cost.distinguishable:
        return "what it saves does not show beyond the noise" if score.latency else "it saves nothing"
    if report.settings.get("k") is None:
        return "the target is met without it"
    dearest = max(one.score for one in report.plan.scores if one.region in report.plan.regions)
    if score.score < dearest:
        return "cheap alone, but others cost less beside those that are cut"
    return "others cost less for what they save"


def _shades(scores: Sequence[float]) -> list[int | None]:
    """Colours by the logarithm of scores: 0 is the cheapest; None where there is no score."""
    known = [math.log(score) for score in scores if 0 < score < math.inf]
    if not known:
        return [None] * len(scores)
    low, span = min(known), (max(known) - min(known)) or 1.0
    return [
        min(int((math.log(score) - low) / span * _SHADES), _SHADES - 1) if 0 < score < math.inf else None
        for score in scores
    ]


def _stages(
    layout: Sequence[Place], chosen: Sequence[str], rows: Sequence[Row]
) -> Iterator[tuple[str, list[tuple[Place, str, Row | None]]]]:
    """Runs of candidates of one shape; each with the label of the cut that takes it away, if any, and its row."""
    containers = {label for place in layout for label in place.inside}
    by_label = {row.label: row for row in rows}
    innermost = [place for place in layout if place.label not in containers]
    for shape, places in groupby(innermost, key=lambda place: place.shape):
        blocks = []
        for place in places:
            cut = next((label for label in (place.label, *place.inside) if label in chosen), "")
            blocks.append((place, cut, by_label.get(place.label)))
        yield " \u00d7 ".join(map(str, shape)) or "no single shape", blocks


def _refused(report: CompressionReport) -> list[tuple[str, int, list[tuple[str, list[str]]]]]:
    """Each reason, how many candidates it refused, and the labels for each of its details; the most frequent first."""
    reasons: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for refused in report.rejections:
        reasons[refused.reason.value][refused.detail].append(refused.label or refused.exit)
    groups = [
        (reason, sum(map(len, details.values())), list(details.items()))
        for reason, details in reasons.items()
    ]
    return sorted(groups, key=lambda group: -group[1])
