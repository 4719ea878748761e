"""How near a compressed network is to the original, on the images that it was fitted to and on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.regions import Region
from fxprune.judging.answers import agreement, answers
from fxprune.recovery.features import FeatureReader, mean_feature_loss, surviving_tap
from fxprune.recovery.original import Original

__all__ = ["Fidelities", "Fidelity", "fidelities", "overfitted"]

_LEAST_DIFFERENCE = 0.02
"""An agreement that is lower by no more than this is no reason to worry, however sure it is."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a network is to the original on some images.

    Attributes:
        images: How many.
        agreement: Share of them on which both name the same class, in [0, 1]; None without class scores.
        feature_error: Mean squared error at the tap.
    """

    images: int
    agreement: float | None
    feature_error: float


@dataclass(frozen=True, slots=True)
class Fidelities:
    """The same network on two sets of images.

    Attributes:
        fitted: On the images that it was fitted to.
        held_back: On those that nothing was fitted to, None where there are none.
    """

    fitted: Fidelity
    held_back: Fidelity | None


def fidelities(
    original: Original,
    student: fx.GraphModule,
    regions: Sequence[Region],
    held_back: CalibrationSet | None = None,
) -> Fidelities:
    """Measures a network against the original.

    Args:
        original: The network that it comes from, with the images that are fitted to.
        student: The network, on the same device.
        regions: What it lacks.
        held_back: The images that nothing is fitted to.
    """
    teacher = FeatureReader(original.graph, original.tap, fold=True)
    reader = FeatureReader(student, surviving_tap(original.tap, regions))

    def on(images: CalibrationSet) -> Fidelity:
        first, second = (answers(one, images, original.device) for one in (original.graph, student))
        error = mean_feature_loss(teacher, reader, images, device=original.device)
        return Fidelity(images.size, agreement(first, second), error)

    return Fidelities(on(original.images), None if held_back is None else on(held_back))


def overfitted(measured: Fidelities) -> str | None:
    """What to tell the user where agreement is well below that on the fitted images on the held-back ones.

    Well below is by more than twice the standard error of the difference of two shares of that many images, and by
    more than two points. The error is that of two draws from one binomial, so that it is not 0 where one share is 0
    or 1.
    """
    fitted, other = measured.fitted, measured.held_back
    if other is None or fitted.agreement is None or other.agreement is None:
        return None
    same = fitted.images * fitted.agreement + other.images * other.agreement
    share = same / (fitted.images + other.images)
    error = math.sqrt(share * (1 - share) * (1 / fitted.images + 1 / other.images))
    if fitted.agreement - other.agreement <= max(2 * error, _LEAST_DIFFERENCE):
        return None
    return (
        f"the network names the original's class on {100 * fitted.agreement:.1f} % of the {fitted.images} images that "
        f"it was fitted to, but on only {100 * other.agreement:.1f} % of the {other.images} that were held back: "
        "expect the latter of new images; give more calibration images, or cut less"
    )
