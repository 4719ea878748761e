"""What networks answer: the class that each image is given, where there are scores of classes at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.call import Inputs

__all__ = ["Answers", "Change", "alike", "answers", "changes", "class_scores", "entropy"]

_ALIKE = 0.1
"""Entropy below which images look alike: of two classes one then has 98.7 % of the images or more, of ten 96.5 %. Rare
classes, such as 2 % of defects, are above it."""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The classes that a network names.

    Attributes:
        named: The class with the largest score for each image: int64 `[N]`, on the CPU.
        classes: How many there are, 2 or more.
    """

    named: Tensor
    classes: int


@dataclass(frozen=True, slots=True)
class Change:
    """An image to which two networks give different classes.

    Attributes:
        image: Its place, as `CalibrationSet.places` tells it.
        held_back: Whether it was held back.
        before: The class that the original names.
        after: The class that the compressed network names.
    """

    image: int
    held_back: bool
    before: int
    after: int


def class_scores(output: Any) -> Tensor | None:
    """The scores `[N, classes]` in what a network returns: its first tensor, None where that is nothing of the kind."""
    first = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
    return None if first is None or first.dim() != 2 or first.shape[1] < 2 else first


@torch.no_grad()
def answers(network: nn.Module, images: CalibrationSet, device: str) -> Answers | None:
    """The class that a network gives each image; None where its outputs are not class scores."""

    def scores_of(batch: Inputs) -> Tensor | None:
        inputs = batch.to(device)
        return class_scores(network(*inputs.args, **inputs.kwargs))

    if scores_of(images.example(2)) is None:  # which few images tell soonest
        return None
    scores = [scores.cpu() for scores in map(scores_of, images.batches(64)) if scores is not None]
    return Answers(torch.cat(scores).argmax(1), scores[0].shape[1])


def changes(
    original: nn.Module,
    small: nn.Module,
    fitted: CalibrationSet,
    held_back: CalibrationSet | None,
    device: str,
) -> tuple[Change, ...] | None:
    """The images whose class has changed, in the order of their places; None without class scores."""
    found: list[Change] = []
    for images, kept_back in ((fitted, False), (held_back, True)):
        if images is None:
            continue
        before, after = (answers(network, images, device) for network in (original, small))
        if before is None or after is None:
            return None
        rows = zip(
            images.places or range(images.size), before.named.tolist(), after.named.tolist(), strict=True
        )
        found += [Change(place, kept_back, one, other) for place, one, other in rows if one != other]
    return tuple(sorted(found, key=lambda change: change.image))


def entropy(given: Answers | None) -> float | None:
    """How evenly the images are spread over the classes that a network names.

    Returns:
        The entropy of the histogram of these classes over the largest that it could have, the logarithm of the number
        of images or of classes, whichever is smaller: 0 where one class has all images, 1 where none has more than
        another. None without classes, or with fewer than two images.
    """
    if given is None or len(given.named) < 2:
        return None
    shares = torch.bincount(given.named).double() / len(given.named)
    return float(torch.special.entr(shares).sum()) / math.log(min(len(given.named), given.classes))


def alike(given: Answers | None) -> str | None:
    """What to tell the user where all or nearly all images are of one class to a network; else None."""
    spread = entropy(given)
    if given is None or spread is None or spread >= _ALIKE:
        return None
    counts = torch.bincount(given.named)
    return (
        f"the calibration images look alike to the original: of its {given.classes} classes it names "
        f"{int((counts > 0).sum())} on {len(given.named)} images, one of them on {int(counts.max())} (entropy "
        f"{100 * spread:.0f} % of the largest possible). What is fitted to them and measured on them says little about "
        "other images; give images like those that the network will serve, of all its classes"
    )
