"""What users' own measures say of a network: accuracy on their labelled images, or a function of theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from fxprune.calibration.labelled import LabelledImages
from fxprune.errors import CalibrationError, OptionError
from fxprune.judging.answers import class_scores
from fxprune.processes.group import on_main

__all__ = ["Accuracy", "Evaluate", "Judge", "Judgement", "accuracy"]

Evaluate: TypeAlias = Callable[[nn.Module], float]
"""A user's own measure of a network, such as its accuracy."""

_CLASSES_FOR_TOP5 = 6
"""Of fewer classes, the right one is always among five."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often a network is right.

    Attributes:
        images: Labelled images that it was measured on.
        top1: Share of them whose class has the largest score, in [0, 1].
        top5: Share of them whose class is among the five largest; None with fewer than six classes.
    """

    images: int
    top1: float
    top5: float | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is said of one network.

    Attributes:
        accuracy: On the labelled images, None without them.
        evaluation: What the user's function returned, None without one.
    """

    accuracy: Accuracy | None
    evaluation: float | None

    @property
    def figure(self) -> float | None:
        """The one number of it: what the function returned, else the top-1 accuracy."""
        if self.evaluation is not None:
            return self.evaluation
        return None if self.accuracy is None else self.accuracy.top1


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges networks, on rank 0 alone.

    Attributes:
        labels: Labelled images, None without them.
        evaluate: The user's function, which is given copies: it may move or change them.
        device: Where the networks are.
    """

    labels: LabelledImages | None
    evaluate: Evaluate | None
    device: str

    @property
    def has_measure(self) -> bool:
        """Whether there is anything to judge by."""
        return self.labels is not None or self.evaluate is not None

    def __call__(self, network: nn.Module) -> Judgement:
        """Judges one network.

        Raises:
            OptionError: Its outputs are not class scores, or the function returned no number.
            CalibrationError: The labelled images cannot be used, or a label is none of the network's classes.
        """

        def judge() -> Judgement:
            measured = None if self.labels is None else accuracy(network, self.labels, self.device)
            return Judgement(measured, None if self.evaluate is None else self._evaluated(network))

        return on_main(judge) if self.has_measure else Judgement(None, None)

    def _evaluated(self, network: nn.Module) -> float:
        assert self.evaluate is not None
        value = self.evaluate(copy.deepcopy(network))
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise OptionError(f"evaluate returned {value!r}; it must return a number") from error


@torch.no_grad()
def accuracy(network: nn.Module, labelled: LabelledImages, device: str) -> Accuracy:
    """Measures a network on labelled images.

    Raises:
        OptionError: Its outputs are not class scores.
        CalibrationError: The images cannot be used, or a label is none of the network's classes.
    """
    images = first = among_five = classes = 0
    for inputs, labels in labelled:
        given = inputs.to(device)
        scores = class_scores(network(*given.args, **given.kwargs))
        if scores is None:
            raise OptionError("labels need a network whose output is one score for each class")
        classes = scores.shape[1]
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise CalibrationError(
                f"labels: an image has the label {int(outside[0])}, but the network's outputs are 0 to {classes - 1}: "
                "a label is the index of the image's class among the outputs"
            )
        wanted = labels.to(scores.device)
        images += len(labels)
        first += int((scores.argmax(1) == wanted).sum())
        if classes >= _CLASSES_FOR_TOP5:
            among_five += int((scores.topk(5).indices == wanted[:, None]).sum())
    return Accuracy(images, first / images, among_five / images if classes >= _CLASSES_FOR_TOP5 else None)
