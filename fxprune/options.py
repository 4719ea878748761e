"""Settings, frozen and validated when they are made, so that nothing fails late."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fxprune.errors import OptionError

__all__ = [
    "RECIPES",
    "Backend",
    "CompressOptions",
    "Criterion",
    "FitSettings",
    "Recipe",
    "Selection",
    "recipe_named",
]

Backend = Literal["torch", "onnxruntime-cpu", "onnxruntime-cuda"]
Criterion = Literal["recovery", "l2", "kl"]
Selection = Literal["greedy", "independent", "exact"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


@dataclass(frozen=True, slots=True)
class FitSettings:
    """One gradient fit.

    Attributes:
        optimizer: `sgd`, `adam`, or `relative-adam`, whose steps are relative to the size of each output channel's
            weights: networks whose batch norm was folded away have channels of very different sizes. `width-adam`
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
        batch_norm: `eval` keeps the running statistics, `train` normalises by the batch and updates them.
        augment: Whether images are cropped and flipped at random.
        cutmix: Whether a box of each image is replaced by that of another one: more kinds of images from a few.
        unnormalised_rate: Learning rate where no batch norm normalises by the batch, and so keeps training stable.
        retries: How often a fit that ended above the error it began with is done again at a tenth of its rate.
    """

    optimizer: Literal["sgd", "adam", "relative-adam", "width-adam"] = "sgd"
    iterations: int = 1000
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine", "constant"] = "step"
    warmup: int = 0
    batch_size: int = 64
    max_pixels: int | None = None
    batch_norm: Literal["eval", "train"] = "eval"
    augment: bool = True
    cutmix: bool = False
    unnormalised_rate: float | None = None
    retries: int = 0

    def __post_init__(self) -> None:
        optimizers = ("sgd", "adam", "relative-adam", "width-adam")
        _require(
            self.optimizer in optimizers,
            f"optimizer is {self.optimizer!r}; choose from {', '.join(optimizers)}",
        )
        _require(self.iterations >= 0, f"iterations is {self.iterations}; it must be 0 or more")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be positive")
        _require(
            self.unnormalised_rate is None or self.unnormalised_rate > 0,
            f"unnormalised_rate is {self.unnormalised_rate}; it must be positive",
        )
        _require(self.retries >= 0, f"retries is {self.retries}; it must be 0 or more")
        _require(self.warmup >= 0, f"warmup is {self.warmup}; it must be 0 or more")
        _require(
            self.max_pixels is None or self.max_pixels >= 1,
            f"max_pixels is {self.max_pixels}; it must be positive",
        )
        _require(0 <= self.momentum < 1, f"momentum is {self.momentum}; it must lie in [0, 1)")
        _require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must be 0 or more")
        schedules = ("step", "cosine", "constant")
        _require(
            self.schedule in schedules, f"schedule is {self.schedule!r}; choose from {', '.join(schedules)}"
        )
        _require(self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be 1 or more")
        _require(
            self.batch_norm in ("eval", "train"), f"batch_norm is {self.batch_norm!r}; choose eval or train"
        )

    def rate(self, iteration: int) -> float:
        """The learning rate at an iteration (counted from 0)."""
        rate = self.learning_rate * min(1.0, (iteration + 1) / (self.warmup + 1))
        if self.schedule == "constant":
            return rate
        if self.schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * iteration / max(1, self.iterations)))
        return float(rate * 0.1 ** int(iteration / max(1.0, 0.4 * self.iterations)))

    def images_per_step(self, pixels: int) -> int:
        """The batch size for images of so many pixels: at least one image."""
        return (
            self.batch_size
            if self.max_pixels is None
            else max(1, min(self.batch_size, self.max_pixels // pixels))
        )


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
    """

    name: str
    scorer: Literal["end-to-end", "cached"]
    adaptor: FitSettings
    mimic: FitSettings
    fold_first: bool
    selection: Selection


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
            augment=False,
        ),
        mimic=FitSettings(
            optimizer="relative-adam",
            iterations=400,
            learning_rate=3e-2,
            unnormalised_rate=3e-3,
            retries=1,
            weight_decay=0.0,
            schedule="cosine",
            warmup=10,
            batch_size=64,
            max_pixels=2**20,
            batch_norm="train",
            cutmix=True,
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
    if recipe not in RECIPES:
        raise OptionError(
            f"recipe is {recipe!r}; choose from {sorted(RECIPES)}, or give a fxprune.options.Recipe"
        )
    return RECIPES[recipe]


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """What `fxprune.compress` was asked for; exactly one of the three goals is set.

    Attributes:
        k: Regions to drop.
        target_speedup: Original latency over new latency, above 1.
        target_latency_ms: New latency, in milliseconds.
        min_agreement: Least top-1 agreement with the original on held-back calibration images, in [0, 1].
        recipe: See `Recipe`.
        criterion: `recovery` (PRACTISE eq. 1), `l2` (feature distance without recovery), `kl` (CURL).
        selection: `greedy` scores again after every cut, `independent` takes the k best, `exact` tries every set.
        backend: Where latency is measured.
        device: Where recovery runs.
        images: Calibration images to draw.
        latency_batch: Images in a timed batch.
        cache_bytes: Memory for cached activations.
        seed: Of every random draw.
    """

    k: int | None
    target_speedup: float | None
    target_latency_ms: float | None
    min_agreement: float | None
    recipe: Recipe
    criterion: Criterion
    selection: Selection
    backend: Backend
    device: str
    images: int
    latency_batch: int
    cache_bytes: int
    seed: int

    def scoring(self) -> dict[str, Any]:
        """The settings that scores depend on: the goal and the way of choosing are not among them."""
        goal = ("k", "target_speedup", "target_latency_ms", "min_agreement", "selection")
        return {name: value for name, value in asdict(self).items() if name not in goal}

    def __post_init__(self) -> None:
        goals = {
            "k": self.k,
            "target_speedup": self.target_speedup,
            "target_latency_ms": self.target_latency_ms,
        }
        given = [name for name, value in goals.items() if value is not None]
        _require(
            len(given) == 1,
            f"give exactly one of k, target_speedup and target_latency_ms, not {given or 'none of them'}",
        )
        _require(
            self.selection != "exact" or self.k is not None,
            "selection='exact' compares sets of one size, so it needs k; use 'greedy' for a target",
        )
        if self.k is not None:
            whole = isinstance(self.k, int) and not isinstance(self.k, bool)
            _require(whole and self.k >= 1, f"k is {self.k!r}; it must be a whole number, 1 or more")
        if self.target_speedup is not None:
            _require(self.target_speedup > 1, f"target_speedup is {self.target_speedup}; it must be above 1")
        if self.target_latency_ms is not None:
            _require(
                self.target_latency_ms > 0,
                f"target_latency_ms is {self.target_latency_ms}; it must be positive",
            )
        if self.min_agreement is not None:
            _require(
                0 <= self.min_agreement <= 1, f"min_agreement is {self.min_agreement}; it must lie in [0, 1]"
            )
        for name, value, choices in (
            ("criterion", self.criterion, get_args(Criterion)),
            ("selection", self.selection, get_args(Selection)),
            ("backend", self.backend, get_args(Backend)),
        ):
            _require(value in choices, f"{name} is {value!r}; choose from {', '.join(choices)}")
        _require(self.images >= 1, f"images is {self.images}; it must be 1 or more")
        _require(self.cache_bytes >= 1, f"cache_bytes is {self.cache_bytes}; it must be positive")
        _require(self.latency_batch >= 1, f"latency_batch is {self.latency_batch}; it must be 1 or more")
