"""One compression under way: what `opening` makes, the stages work on, and `closing` ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.regions import Discovery, Region
from fxprune.judging.judge import Judge, Judgement
from fxprune.options import Options
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.recovery.original import Original
from fxprune.reports.call import SHELL_COMMAND
from fxprune.scoring.scorer import Scorer
from fxprune.scoring.store import ScoreStore
from fxprune.submodules.parts import Parts
from fxprune.submodules.whole import Whole

__all__ = ["Job", "StageTimes"]


class StageTimes:
    """Seconds that each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time that a `with` block takes to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class Job:
    """One compression under way.

    Attributes:
        options: What was asked for, defaults filled in.
        model: The caller's model, never changed.
        parts: The parts of it that the network joins; None where it is the whole model.
        whole: A copy of it, for latencies, where the network is a part of it and torch is timed.
        original: The network to be compressed, a private copy, and what always goes with it.
        trainable: Names of its parameters that the caller had not frozen.
        discovery: Regions and rejections.
        held_back: Images that nothing is fitted to but in the last steps, a fifth of all; None where there are too few
            and no `min_agreement`.
        entropy: Of the classes that the original names on all images; see `fxprune.judging.answers.entropy`.
        notes: What the user should know about the images.
        judge: The caller's own measures of a network.
        judged: What they say of the original.
        scorer: Tells what cuts cost; remembers on disk where a folder was given.
        store: The memory itself, None without a folder.
        folder: Where results go, None if nowhere.
        show_progress: Whether this process draws progress bars.
        stage: Seconds that each stage took.
        fits: Fitted adaptors of single regions, by label, once they were scored.
    """

    options: Options
    model: Any
    parts: Parts | None
    whole: Whole | None
    original: Original
    trainable: frozenset[str]
    discovery: Discovery
    held_back: CalibrationSet | None
    entropy: float | None
    notes: tuple[str, ...]
    judge: Judge
    judged: Judgement
    scorer: Scorer
    store: ScoreStore | None
    folder: Path | None
    show_progress: bool
    stage: StageTimes
    fits: dict[str, AdaptorFit] = field(default_factory=dict)

    @property
    def latency_batch(self) -> int:
        """Images in a timed batch."""
        assert self.options.latency_batch is not None  # filled in when the job was opened
        return self.options.latency_batch

    def fits_of(self, regions: Sequence[Region]) -> list[AdaptorFit]:
        """Fits of a set's single regions, for a fit of the set to begin at; none where they were not scored."""
        return [self.fits[region.label] for region in regions] if self.fits else []

    def settings(self) -> dict[str, Any]:
        """What was asked for and found, as plain data."""
        command = SHELL_COMMAND.get()
        typed = {} if command is None else {"command": command}
        return {**self.options.to_dict(), "tap": list(self.original.tap), **typed}
