"""Recipes: how adaptors are fitted and the whole network mimics, published or quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fxprune.errors import OptionError
from fxprune.validation import is_number, is_whole, one_of, require

__all__ = ["RECIPES", "FitSettings", "Recipe", "Selection", "recipe_named"]

Optimizer = Literal["sgd", "adam", "relative-adam", "relative-muon", "width-adam"]
Schedule = Literal["step", "cosine", "constant"]
BatchNormMode = Literal["eval", "train", "either"]
Selection = Literal["greedy", "independent", "exact"]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """One gradient fit.

    Attributes:
        optimizer: `sgd`, `adam`, or `relative-adam`, whose steps are relative to the size of each output channel's
            weights: networks whose batch norm was folded away have channels of very different sizes. `relative-muon`
            makes such steps by Muon, which moves matrices in all their directions alike. `width-adam`
            divides the rate by the number of channels that a weight reads, so that adaptors of all widths learn alike.
        iterations: Steps; 0 leaves the start as it is.
        learning_rate: At the beginning.
        momentum: Of SGD; Adam has its usual moments.
        weight_decay: L2 penalty, coupled as in `torch.optim`.
        schedule: `step` divides the rate by 10 every 40 % of the iterations, `cosine` lets it fall to zero,
            `constant` keeps it.
        warmup: Iterations in which the rate rises from nothing, on top of the schedule.
        batch_size: Images a step, or all of them if there are fewer.
        max_pixels: Most pixels (height x width) a step, so that large images come in smaller batches.
        dense_pixels: The same where the tap is what the network returns, as of one for segmentation: each place there
            has an answer of its own, so that fewer images tell as much.
        batch_norm: `eval` keeps the running statistics, `train` normalises by the batch and updates them, `either`
            tries `train` first, then `eval`.
        augment: Whether images are cropped and flipped at random.
        cutmix: Whether a box of each image is replaced by that of another one: more kinds of images from a few.
        rates: Learning rates to try, from the largest down, until one leads to a smaller error; with none it is
            `learning_rate`.
        looks: How often the error on held-back images is looked at, the end included; the best state is kept.
        near_cuts: Whether to compare at the junctions right behind the cuts in place of the tap, where there are such,
            and to train what lies before those: a small part of the network, so that steps are cheap and bear a larger
            rate.
        final_iterations: Steps behind the others, at the next smaller rate, on all images, those held back among them;
            none where none are held back or where the others did not help.
        junctions: Whether features at the tap are compared at junctions before it too, each by its variance.
        changed_only: Whether what lies before the first change is left alone: it answers the same in both networks.

    Raises:
        OptionError: A value is out of range.
    """

    optimizer: Optimizer = "sgd"
    iterations: int = 1000
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Schedule = "step"
    warmup: int = 0
    batch_size: int = 64
    max_pixels: int | None = None
    dense_pixels: int | None = None
    batch_norm: BatchNormMode = "eval"
    augment: bool = True
    cutmix: bool = False
    rates: tuple[float, ...] = ()
    looks: int = 1
    near_cuts: bool = False
    final_iterations: int = 0
    junctions: bool = False
    changed_only: bool = False

    def __post_init__(self) -> None:
        count = "it must be a whole number, 0 or more"
        require(
            self,
            (
                one_of("optimizer", self.optimizer, Optimizer),
                ("iterations", is_whole(self.iterations, 0), count),
                ("learning_rate", is_number(self.learning_rate, 0), "it must be positive"),
                ("momentum", 0 <= self.momentum < 1, "it must lie in [0, 1)"),
                ("weight_decay", self.weight_decay >= 0, "it must be 0 or more"),
                one_of("schedule", self.schedule, Schedule),
                ("warmup", is_whole(self.warmup, 0), count),
                ("batch_size", is_whole(self.batch_size), "it must be a whole number, 1 or more"),
                ("max_pixels", self.max_pixels is None or is_whole(self.max_pixels), "it must be positive"),
                (
                    "dense_pixels",
                    self.dense_pixels is None or is_whole(self.dense_pixels),
                    "it must be positive",
                ),
                one_of("batch_norm", self.batch_norm, BatchNormMode),
                (
                    "rates",
                    isinstance(self.rates, tuple) and all(is_number(rate, 0) for rate in self.rates),
                    "it must be a tuple of positive numbers",
                ),
                ("final_iterations", is_whole(self.final_iterations, 0), count),
                ("looks", is_whole(self.looks), "it must be a whole number, 1 or more"),
            ),
        )

    def rate(self, iteration: int) -> float:
        """The learning rate at an iteration (counted from 0)."""
        rate = self.learning_rate * min(1.0, (iteration + 1) / (self.warmup + 1))
        if self.schedule == "constant":
            return rate
        if self.schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * iteration / max(1, self.iterations)))
        return float(rate * 0.1 ** int(iteration / max(1.0, 0.4 * self.iterations)))

    def images_per_step(self, pixels: int, *, dense: bool = False) -> int:
        """The batch size for images of so many pixels, of a network with a dense output or not: at least one image."""
        bounds = [self.max_pixels, self.dense_pixels if dense else None]
        return max(1, min([self.batch_size, *(bound // pixels for bound in bounds if bound is not None)]))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How recovery works, from scoring to the final mimicking.

    Attributes:
        name: As users type it.
        scorer: `end-to-end` runs the whole network for every step of every region (PRACTISE); `cached` starts from
            least squares and trains behind cached activations.
        adaptor: The fit of the adaptors.
        mimic: The fit of the whole network after the cut.
        fold_first: Whether the chosen set's fitted adaptors are folded in before mimicking; PRACTISE mimics from the
            bare cut.
        selection: How sets are chosen unless the user says otherwise.

    Raises:
        OptionError: The adaptors' fit has several rates, or is to find the mode of batch norms.
    """

    name: str
    scorer: Literal["end-to-end", "cached"]
    adaptor: FitSettings
    mimic: FitSettings
    fold_first: bool
    selection: Selection

    def __post_init__(self) -> None:
        alone = not self.adaptor.rates and self.adaptor.batch_norm != "either"
        require(self, (("adaptor", alone, "only mimicking tries several rates or modes of batch norms"),))


RECIPES: dict[str, Recipe] = {
    # PRACTISE, section 4, "Implementation details"
    "practise": Recipe(
        name="practise",
        scorer="end-to-end",
        adaptor=FitSettings(iterations=1000, batch_norm="eval"),
        mimic=FitSettings(iterations=2000, batch_norm="train"),
        fold_first=False,
        selection="independent",
    ),
    "fast": Recipe(
        name="fast",
        scorer="cached",
        adaptor=FitSettings(
            optimizer="width-adam",
            iterations=80,
            learning_rate=0.2,
            weight_decay=0.0,
            schedule="cosine",
            warmup=5,
            batch_size=8,
            dense_pixels=2**16,
            augment=False,
        ),
        mimic=FitSettings(
            optimizer="relative-muon",
            iterations=400,
            rates=(3e-2, 1e-2, 3e-3, 1e-3),
            looks=8,
            near_cuts=True,
            final_iterations=100,
            weight_decay=0.0,
            schedule="cosine",
            warmup=10,
            batch_size=64,
            max_pixels=2**20,
            dense_pixels=2**16,
            batch_norm="either",
            cutmix=True,
            junctions=True,
            changed_only=True,
        ),
        fold_first=True,
        selection="greedy",
    ),
}
"""`practise` follows the paper to the letter; `fast` is the default."""


def recipe_named(recipe: str | Recipe) -> Recipe:
    """Looks a recipe up; a `Recipe` is returned as it is.

    Raises:
        OptionError: There is none of that name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise OptionError(
            f"recipe is {recipe!r}; choose from {sorted(RECIPES)}, or give a fxprune.options.Recipe"
        )
    return RECIPES[recipe]
