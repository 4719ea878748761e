"""Mimicking that finds its own rate and never ends worse than it began, judged on images that it does not fit."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from fxprune.errors import CalibrationError
from fxprune.options import FitSettings
from fxprune.processes.group import on_main
from fxprune.recipes import BatchNormMode
from fxprune.recovery.comparison import Comparison
from fxprune.recovery.original import Original
from fxprune.recovery.training import adaptable_norms, fit_features

__all__ = ["ON_ALL", "Attempt", "Mimicking", "mimic"]

logger = logging.getLogger(__name__)

ON_ALL = "on all images"
"""What a fit says of itself that takes in the images that were held back."""

_ENOUGH_TO_NORMALISE = 32
"""Images in a step from which on normalising by them is tried: those of 20 did harm, those of 40 helped."""

_AWAY = 1.25
"""Where the error at the first look is more than so many times that at the start, a smaller rate is tried instead."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A fit at one setting.

    Attributes:
        learning_rate: Of it.
        batch_norm: `eval` or `train`, as in `FitSettings`.
        iterations: Steps taken; fewer than asked for where it was given up or diverged.
        feature_error: On the judging images at its end; infinite where it diverged.
        looks: Steps and that error at the start and at every look on the way.
    """

    learning_rate: float
    batch_norm: BatchNormMode
    iterations: int
    feature_error: float
    looks: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Mimicking:
    """How one fit of mimicking went.

    Attributes:
        compared: Where: `near the cuts` or `at the tap`; or `on all images`, those held back too, at the same place
            as the fit in front of it.
        attempts: In the order in which they were made, all from the same state; the last one holds.
        best: Steps of it after which the state was the best, which is the one that was kept; 0 where no attempt had a
            better one than the start, so that all were undone.
    """

    compared: str
    attempts: tuple[Attempt, ...]
    best: int

    @property
    def last(self) -> Attempt:
        """The attempt that holds."""
        return self.attempts[-1]


class _AwayError(Exception):
    """A fit leads away from the original."""


class _Best:
    """The best state that a network was in, by the feature error on the images that judge; the start is the first."""

    def __init__(self, network: nn.Module, measure: Callable[[], float]) -> None:
        self._network, self._measure = network, measure
        self.step = 0
        self.last = self.error = self._measured()
        self._keep()

    def look(self, step: int) -> None:
        """Measures the network as it is after so many steps, and keeps its state if it is the best."""
        self.last = self._measured()
        if self.last < self.error:  # which nothing that is not a number is
            self.error, self.step = self.last, step
            self._keep()

    def restore(self) -> None:
        """Puts the network back into its best state."""
        self._network.load_state_dict(self._state)

    def _measured(self) -> float:
        # one rank's word for all: they must agree which state is the best
        return on_main(self._measure)

    def _keep(self) -> None:
        # deep, for quantised modules keep more than tensors in it
        self._state = copy.deepcopy(self._network.state_dict())


def mimic(
    student: fx.GraphModule,
    comparison: Comparison,
    parameters: Sequence[nn.Parameter],
    original: Original,
    settings: FitSettings,
    measure: Callable[[], float],
    *,
    title: str,
    progress: bool = False,
) -> Mimicking:
    """Trains a network towards the original, and leaves it in the best state that was seen.

    The rates are tried from the largest down, all from the same state, until one leads to a better one. An attempt that
    has clearly led away from the original at the first look is given up there, where another setting is left to try.

    Args:
        student: The network; changed in place.
        comparison: Of it with the original.
        parameters: What to train.
        original: Its images are fitted.
        settings: Of the fit.
        measure: Tells how far the network is from the original, best of all on images that are not fitted.
        title: Of the fit, in progress bars and in what is returned.
        progress: Whether to draw progress bars.

    Raises:
        CalibrationError: The features of the network are not finite to begin with.
    """
    best = _Best(student, measure)
    start = best.error
    if not math.isfinite(start):
        raise CalibrationError(
            f"the feature error in front of mimicking is {start}: the images or the weights are out of range"
        )
    attempts: list[Attempt] = []
    normalised = min(settings.batch_size, original.images.size) >= _ENOUGH_TO_NORMALISE
    to_try = _to_try(settings, normalised and bool(adaptable_norms(comparison.student)))
    looks: list[tuple[int, float]] = []

    def look(step: int) -> None:
        best.look(step)
        looks.append((step, best.last if math.isfinite(best.last) else math.inf))
        first, others_left = len(looks) == 2, len(attempts) + 1 < len(to_try)
        if first and others_left and step < settings.iterations and not best.last <= _AWAY * start:
            raise _AwayError

    for mode, rate in to_try:
        looks[:] = [(0, start)]
        try:
            fit_features(
                comparison,
                parameters,
                original,
                replace(settings, learning_rate=rate, batch_norm=mode),
                progress=progress,
                title=title,
                shared=True,
                look=look,
            )
            error = looks[-1][1]
        except _AwayError:
            error = looks[-1][1]
        except CalibrationError as failure:  # the loss left the finite numbers
            logger.info("%s", failure)
            error = math.inf
        best.restore()
        attempts.append(Attempt(rate, mode, looks[-1][0], error, tuple(looks)))
        if best.step:
            break
    return Mimicking(title, tuple(attempts), best.step)


def _to_try(settings: FitSettings, normalised: bool) -> list[tuple[BatchNormMode, float]]:
    """Modes of batch norms and rates in the order in which they are tried.

    Where normalising by the batch does harm it does so at any rate, so it is tried at the largest alone.
    """
    rates = sorted(settings.rates or (settings.learning_rate,), reverse=True)
    if settings.batch_norm != "either":
        return [(settings.batch_norm, rate) for rate in rates]
    running: list[tuple[BatchNormMode, float]] = [("eval", rate) for rate in rates]
    return [("train", rates[0]), *running] if normalised else running
