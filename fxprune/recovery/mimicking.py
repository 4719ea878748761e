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

__all__ = ["Mimicking", "Probe", "mimic"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Probe:
    """A short fit that tells how a setting does.

    Attributes:
        learning_rate: Of it.
        batch_norm: `eval` or `train`, as in `FitSettings`.
        feature_error: On the judging images at its end.
    """

    learning_rate: float
    batch_norm: BatchNormMode
    feature_error: float


@dataclass(frozen=True, slots=True)
class Mimicking:
    """How one fit of mimicking went.

    Attributes:
        compared: Where: `near the cuts` or `at the tap`.
        learning_rate: That it was done at.
        batch_norm: `eval` or `train`, as in `FitSettings`.
        iterations: Steps taken, those of the probe that it began at included.
        best: Steps after which the state was the best, which is the one that was kept; 0 where none was better than
            the start, so that the fit was undone.
        probes: In the order in which they were made; empty where the rate was given.
    """

    compared: str
    learning_rate: float
    batch_norm: BatchNormMode
    iterations: int
    best: int
    probes: tuple[Probe, ...]


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
        self._state = copy.deepcopy(
            self._network.state_dict()
        )  # quantised modules keep more than tensors in it


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
    """Trains a network towards the original, from the best probe on, and leaves it in the best state that was seen.

    Args:
        student: The network; changed in place.
        comparison: Of it with the original.
        parameters: What to train.
        original: Its images are fitted.
        settings: Of the fit and the probes.
        measure: Tells how far the network is from the original, best of all on images that are not fitted.
        title: Of the fit, in progress bars and in what is returned.
        progress: Whether to draw progress bars.

    Raises:
        CalibrationError: The features of the network are not finite to begin with.
    """
    best = _Best(student, measure)
    if not math.isfinite(best.error):
        raise CalibrationError(
            f"the feature error in front of mimicking is {best.error}: the images or the weights are out of range"
        )

    def fit(settings: FitSettings, title: str, before: int = 0) -> float:
        """Fits from the present state on, and gives the error where that ended, infinity where it diverged."""
        try:
            fit_features(
                comparison,
                parameters,
                original,
                settings,
                progress=progress,
                title=title,
                shared=True,
                look=lambda step: best.look(before + step),
            )
        except CalibrationError as error:  # the loss left the finite numbers
            logger.info("%s", error)
            return math.inf
        return best.last if math.isfinite(best.last) else math.inf

    probes: list[Probe] = []
    if settings.rates:
        settings, probes = _probed(student, comparison.student, settings, fit)
        best.restore()
    taken = best.step
    fit(settings, title, taken)
    best.restore()
    steps = taken + settings.iterations
    return Mimicking(title, settings.learning_rate, settings.batch_norm, steps, best.step, tuple(probes))


def _probed(
    student: nn.Module,
    part: fx.GraphModule,
    settings: FitSettings,
    fit: Callable[[FitSettings, str], float],
) -> tuple[FitSettings, list[Probe]]:
    """The settings with the rate, and the mode of batch norms, whose probe ended with the least error.

    All probes begin at the same state. For each mode the rates are tried from the largest down, until the error rises.
    """
    start = copy.deepcopy(student.state_dict())
    modes: tuple[BatchNormMode, ...] = (settings.batch_norm,)
    if settings.batch_norm == "either":
        modes = ("train", "eval") if adaptable_norms(part) else ("eval",)
    probes: list[Probe] = []
    for mode in modes:
        error = math.inf
        for rate in sorted(settings.rates, reverse=True):
            student.load_state_dict(start)
            short = replace(
                settings,
                iterations=min(settings.probe_iterations, settings.iterations),
                learning_rate=rate,
                batch_norm=mode,
                looks=1,
            )
            before, error = error, fit(short, f"probe at {rate:g}")
            probes.append(Probe(rate, mode, error))
            if error >= before and math.isfinite(error):
                break
    chosen = min(probes, key=lambda probe: probe.feature_error)
    return replace(settings, learning_rate=chosen.learning_rate, batch_norm=chosen.batch_norm), probes
