"""The report of one compression: everything that was decided, measured and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from fxprune.graph.regions import Rejection
from fxprune.judging.answers import Change
from fxprune.judging.judge import Accuracy
from fxprune.measurements import CountComparison, Latency, LatencyComparison
from fxprune.records import plain, restored
from fxprune.recovery.fidelity import Fidelities
from fxprune.recovery.mimicking import ON_ALL, Mimicking
from fxprune.reports.fewer_bits import FewerBits
from fxprune.reports.layout import Place
from fxprune.reports.tables import render
from fxprune.selection.plans import BlockScore, DropPlan

__all__ = ["REPORT", "CompressionReport", "entropy_lines", "score_row"]

REPORT = "fxprune_report"
"""Key of the report in a compressed graph's `meta`."""

_DERIVED = ("images", "recovery_loss_before", "recovery_loss_after", "agreement", "held_back_agreement")
"""Properties that `report.json` holds beside the fields."""


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What `fxprune.compress` did.

    Attributes:
        plan: Scores of all regions, and the chosen ones.
        latency: The compressed network against the original; of a part of a model, the whole with each in its place,
            where the backend is torch.
        rejections: Candidates that cannot be dropped, with reasons.
        fidelity_before: How near the network was to the original after the cut, before mimicking.
        fidelity_after: The same after mimicking; on the held-back images before the last steps fit them (see `notes`).
        mimicking: How the fits between the two went, in their order.
        entropy: Of the classes that the original names on all calibration images, over the largest possible, in [0, 1];
            None without class scores or with fewer than two images.
        fold_error: Largest difference at the tap between adaptors in place and folded, relative to the largest feature;
            None where no adaptor was fitted for the final network.
        parameters: Parameters before and after.
        accuracy: Of the original (`before`) and of the compressed network (`after`), None without `labels`.
        evaluation: What the user's `evaluate` returned for each of the two, None without one.
        peak_memory_bytes: Most memory the process (on CUDA: the allocator) has held.
        settings: What was asked for.
        seed: Of every random draw.
        durations: Seconds that each stage took.
        versions: Of the software and the machine.
        notes: What the user should know.
        files: SHA-256 (hex) of every file that stands beside `report.json`, by name.
        layout: Regions and refused candidates in the order of the network.
        changed: The images to which the compressed network gives another class than the original, those held back among
            them; None without class scores.
        fewer_bits: The ONNX files in half precision or in eight bits, by name.
        part_latency: The part by itself, where `latency` is that of the whole model around it.
    """

    plan: DropPlan
    latency: LatencyComparison
    rejections: tuple[Rejection, ...]
    fidelity_before: Fidelities
    fidelity_after: Fidelities
    entropy: float | None
    fold_error: float | None
    parameters: tuple[int, int]
    accuracy: Mapping[str, Accuracy] | None
    evaluation: Mapping[str, float] | None
    peak_memory_bytes: int | None
    settings: Mapping[str, Any]
    seed: int
    durations: Mapping[str, float]
    versions: Mapping[str, str]
    mimicking: tuple[Mimicking, ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    layout: tuple[Place, ...] = ()
    changed: tuple[Change, ...] | None = None
    fewer_bits: Mapping[str, FewerBits] = field(default_factory=dict)
    part_latency: LatencyComparison | None = None

    @classmethod
    def from_json(cls, text: str | bytes) -> CompressionReport:
        """The report that `to_json` wrote; what was not finite is infinite.

        Raises:
            ValueError: The text is none.
        """
        try:
            data = json.loads(text)
            for row in data["plan"]["scores"]:
                row["cost"] = row["count"] if row["latency"] is None else row["latency"]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no report ({error!r})") from error
        return restored(cls, data)

    @property
    def before(self) -> Latency:
        """Latency of the original."""
        return self.latency.before

    @property
    def after(self) -> Latency:
        """Latency of the compressed network."""
        return self.latency.after

    @property
    def images(self) -> int:
        """Calibration images that were fitted to."""
        return self.fidelity_after.fitted.images

    @property
    def recovery_loss_before(self) -> float:
        """Mean squared error at the tap on these images after the cut, before mimicking."""
        return self.fidelity_before.fitted.feature_error

    @property
    def recovery_loss_after(self) -> float:
        """The same after mimicking."""
        return self.fidelity_after.fitted.feature_error

    @property
    def agreement(self) -> float | None:
        """Top-1 agreement with the original on these images at the end, None without class scores."""
        return self.fidelity_after.fitted.agreement

    @property
    def held_back_agreement(self) -> float | None:
        """The same on the images that were held back, None without them."""
        other = self.fidelity_after.held_back
        return None if other is None else other.agreement

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that trackers of experiments compare, by name; those that nobody knows are missing."""
        known = {
            "cuts": len(self.plan.chosen),
            "latency_ratio": self.latency.ratio,
            "latency_ms_before": 1e3 * self.before.median_s,
            "latency_ms_after": 1e3 * self.after.median_s,
            "parameters_before": self.parameters[0],
            "parameters_after": self.parameters[1],
            "feature_error": self.recovery_loss_after,
            "agreement": self.agreement,
            "held_back_agreement": self.held_back_agreement,
            "top1_before": None if self.accuracy is None else self.accuracy["before"].top1,
            "top1_after": None if self.accuracy is None else self.accuracy["after"].top1,
        }
        return {name: float(value) for name, value in known.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to `report.json`."""
        data: dict[str, Any] = plain(asdict(self))
        data |= {name: plain(getattr(self, name)) for name in _DERIVED}
        data["plan"]["chosen"] = list(self.plan.chosen)
        data["plan"]["scores"] = [score_row(score) for score in self.plan.scores]
        data["latency"]["saved_s"] = self.latency.saved_s
        return data

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @property
    def part(self) -> str | None:
        """What was compressed of a model, in words; None where it was the whole."""
        path = self.settings.get("submodule")
        return path if path is None or isinstance(path, str) else " and ".join(path)

    @property
    def verdict(self) -> str:
        """What came out, in one sentence."""
        speed, cut = self.latency, len(self.plan.chosen)
        regions = sum(place.refused is None for place in self.layout)
        without = f"{cut} of its {regions} regions" if regions else f"{cut} of its regions"
        name = "the network" if self.part is None else f"its part {self.part}"
        name = "the whole model" if self.part_latency else name
        low, high = 1 / speed.interval.high, 1 / speed.interval.low
        doubt = ", which is not beyond the noise," if low <= 1 <= high else ""
        where = f"in {speed.before.backend} on {speed.before.device}"
        parts = [
            f"Without {without} {name} is {1 / speed.ratio:.2f} times as fast "
            f"({100 * speed.interval.level:.0f} % interval {low:.2f} to {high:.2f}){doubt} {where}"
        ]
        fidelity = self.fidelity_after.held_back or self.fidelity_after.fitted
        if fidelity.agreement is not None:
            which = "fitted" if self.fidelity_after.held_back is None else "held-back"
            share = f"{100 * fidelity.agreement:.1f} % of {fidelity.images} {which} images"
            parts.append(f"it names the original's class on {share}")
        if self.accuracy is not None:
            before, after = self.accuracy["before"], self.accuracy["after"]
            parts.append(f"its top-1 accuracy went from {100 * before.top1:.2f} to {100 * after.top1:.2f} %")
        return "; ".join(parts) + "."

    def __repr__(self) -> str:
        return f"<CompressionReport: {self.verdict}>"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.verdict)}</p>{self.plan._repr_html_()}"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        rows = []
        for score in self.plan.scores:
            timed = score.latency
            rows.append(
                [
                    "cut" if score.region.label in self.plan.chosen else "",
                    score.region.label,
                    score.region.kind.value,
                    f"{score.recovery_loss:.4g}",
                    "-" if timed is None else f"{1e3 * timed.saved_s:.3f}",
                    _share(score),
                    f"{score.score:.4g}" if math.isfinite(score.score) else "-",
                ]
            )
        headers = ["", "region", "kind", "recovery loss", "saves ms", "saves", "score"]
        chosen = render(headers, rows) if rows else f"cut as asked for: {', '.join(self.plan.chosen)}"
        lines = [chosen, "", *self._latency_lines()]
        before, after = self.parameters
        lines.append(f"parameters {before:,} -> {after:,} ({100 * (after / before - 1):+.1f} %)")
        lines.extend(self._mimicking_lines())
        lines.extend(self._fidelity_lines())
        lines.extend(entropy_lines(self.entropy))
        lines.extend(self._judgement_lines())
        lines.extend(f"{name}: {made.line}" for name, made in self.fewer_bits.items())
        if self.fold_error is not None:
            lines.append(
                f"folding the adaptors changed the features by {self.fold_error:.1e} of their largest value"
            )
        if self.peak_memory_bytes is not None:
            lines.append(f"peak memory {self.peak_memory_bytes / 2**20:.0f} MiB")
        lines.append(f"refused candidates: {len(self.rejections)}")
        lines.append(
            "took " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.durations.items())
        )
        lines.extend(f"note: {note}" for note in self.notes)
        return lines

    def _mimicking_lines(self) -> list[str]:
        """One line for each fit: its rate, and which of its steps was the best."""
        return [
            f"mimicked {fit.compared} at a learning rate of {fit.last.learning_rate:g}, "
            + (
                f"best after {fit.best} of {fit.last.iterations} steps"
                if fit.best
                else "undone: no step was better"
            )
            for fit in self.mimicking
        ]

    def _fidelity_lines(self) -> list[str]:
        """Two lines for the fitted images, and two for those held back: each after the cut, and at the end.

        Images that were held back count no longer as such once the last steps have fitted them.
        """
        before, after = self.fidelity_before, self.fidelity_after
        taken_in = any(fit.compared == ON_ALL and fit.best for fit in self.mimicking)
        lines: list[str] = []
        for first, last, which, end in (
            (before.fitted, after.fitted, "fitted", "at the end"),
            (
                before.held_back,
                after.held_back,
                "held-back",
                "before all were fitted" if taken_in else "at the end",
            ),
        ):
            if first is None or last is None:
                continue
            on = f"{which} images ({last.images}):"
            lines.append(
                f"{on} feature error {first.feature_error:.4g} after the cut, {last.feature_error:.4g} {end}"
            )
            if first.agreement is not None and last.agreement is not None:
                lines.append(
                    f"{on} same top-1 class as the original on {100 * first.agreement:.1f} % after the cut, "
                    f"{100 * last.agreement:.1f} % {end}"
                )
        return lines

    def _judgement_lines(self) -> list[str]:
        """What the user's own measures say of both networks."""
        lines: list[str] = []
        if self.accuracy is not None:
            before, after = self.accuracy["before"], self.accuracy["after"]
            where = f"on {after.images} labelled images"
            lines.append(f"top-1 accuracy {100 * before.top1:.2f} -> {100 * after.top1:.2f} % {where}")
            if before.top5 is not None and after.top5 is not None:
                lines.append(f"top-5 accuracy {100 * before.top5:.2f} -> {100 * after.top5:.2f} % {where}")
        if self.evaluation is not None:
            lines.append(f"evaluation {self.evaluation['before']:.4g} -> {self.evaluation['after']:.4g}")
        return lines

    def _latency_lines(self) -> list[str]:
        """One line for the network; two for a part of a model and the whole."""
        part, path = self.part_latency, self.part
        if part is None:
            return [_latency_line("latency" if path is None else f"latency of {path} alone", self.latency)]
        whole = _latency_line("latency of the whole model", self.latency)
        return [whole, _latency_line(f"latency of {path} alone", part)]


def _latency_line(title: str, timed: LatencyComparison) -> str:
    before, after, interval = timed.before, timed.after, timed.interval
    return (
        f"{title} {1e3 * before.median_s:.3f} -> {1e3 * after.median_s:.3f} ms, ratio {timed.ratio:.3f} "
        f"[{interval.low:.3f}, {interval.high:.3f}] ({before.backend}, {before.device}, "
        f"batch {before.batch_shape[0]}, {before.threads} threads, {before.runs} pairs)"
    )


def score_row(score: BlockScore) -> dict[str, Any]:
    """A score as plain data: what was timed as `latency` with the seconds saved, what was counted as `count`."""
    row: dict[str, Any] = plain(asdict(score))
    cost, timed = row.pop("cost"), score.latency
    row |= {"latency": None, "count": cost} if timed is None else {"latency": cost, "saved_s": timed.saved_s}
    return row | {"score": score.score if math.isfinite(score.score) else None}


def _share(score: BlockScore) -> str:
    """What a cut saves, in words."""
    if not score.cost.distinguishable:
        return "nothing" if score.latency is None else "lost in noise"
    unit = f" of {score.cost.unit}" if isinstance(score.cost, CountComparison) else ""
    return f"{100 * score.cost.saving:.1f} %{unit}"


def entropy_lines(entropy: float | None) -> list[str]:
    """One line on how the calibration images are spread over the classes, none where that is not known."""
    if entropy is None:
        return []
    share = f"{100 * entropy:.0f} % of the largest possible"
    return [f"calibration images, by the class that the original names: entropy {share}"]
