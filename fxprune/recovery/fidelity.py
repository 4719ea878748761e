"""How near a compressed network is to the original, on the images that it was fitted to and on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.call import Inputs
from fxprune.graph.regions import Region
from fxprune.judging.answers import class_scores
from fxprune.recovery.features import FeatureReader, mean_error, surviving_tap
from fxprune.recovery.original import Original

__all__ = ["Fidelities", "Fidelity", "fidelity", "overfitted"]

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


def fidelity(
    original: Original, student: fx.GraphModule, regions: Sequence[Region], images: CalibrationSet
) -> Fidelity:
    """Measures a network against the original on some images.

    Args:
        original: The network that it comes from.
        student: The network, on the same device.
        regions: What it lacks.
        images: To measure on.
    """
    teacher = _Reader(original.graph, original.tap)
    reader = _Reader(student, surviving_tap(original.tap, regions))
    named: list[tuple[Tensor | None, Tensor | None]] = []

    def features(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        (got, ours), (wanted, theirs) = reader(inputs), teacher(inputs)
        named.append((ours, theirs))
        return got, wanted

    error = mean_error(features, images, original.device)
    return Fidelity(images.size, agreement(named), error)


def agreement(named: Sequence[tuple[Tensor | None, Tensor | None]]) -> float | None:
    """Share of images that two networks give the same class, from the classes in each batch; None without classes."""
    pairs = [(one, other) for one, other in named if one is not None and other is not None]
    if len(pairs) < len(named):
        return None
    return sum(int((one == other).sum()) for one, other in pairs) / sum(len(one) for one, _ in pairs)


class _Reader:
    """Runs a network once for its features at the tap and for the classes that it names."""

    def __init__(self, gm: fx.GraphModule, tap: Sequence[str]) -> None:
        self._output = gm.graph.output_node()
        outputs = [node.name for node in self._output.all_input_nodes]
        self._names = list(dict.fromkeys((*tap, *outputs)))
        self._taps = len(tap)
        self._read = FeatureReader(gm, self._names, fold=True, copies=True)

    def __call__(self, inputs: Inputs) -> tuple[Sequence[Tensor], Tensor | None]:
        """Features, and the class of each image; None for the latter where the outputs are not class scores."""
        values = dict(zip(self._names, self._read(inputs), strict=True))
        scores = class_scores(fx.node.map_arg(self._output.args[0], lambda node: values[node.name]))
        features = [values[name] for name in self._names[: self._taps]]
        return features, None if scores is None else scores.argmax(1)


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
