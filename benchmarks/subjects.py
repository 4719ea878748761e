"""What the speed benchmarks share: networks with their images, one compression opened, results kept as they come."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import data, environment
from benchmarks.models.cifar_resnet import resnet
from benchmarks.models.mobilenet_v2 import MobileNetV2
from fxprune.calibration.drawing import draw
from fxprune.errors import OptionError
from fxprune.graph.regions import Region
from fxprune.measurements import Interval, Latency, LatencyComparison
from fxprune.options import Backend, CompressOptions, Recipe, Selection, recipe_named
from fxprune.pipeline.job import Job, open_job
from fxprune.pipeline.stages import repair
from fxprune.selection.planner import Planner
from fxprune.selection.plans import BlockScore, DropPlan
from fxprune.timing.savings import measure_savings

__all__ = [
    "MODELS",
    "Notebook",
    "Subject",
    "add_arguments",
    "block_scores",
    "counts",
    "job_of",
    "kept_result",
    "reach",
    "recipes_of",
    "savings_of",
    "settings_of",
    "shortened",
    "subject_of",
    "test_images",
    "words",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """How a network and its images are made.

    Attributes:
        build: Makes the network, weights random.
        size: Side of its images.
        weights: Name of its trained weights, None where there are none.
        photographs: Whether its images are the photographs; else those of CIFAR-10.
    """

    build: Callable[[], nn.Module]
    size: int
    weights: str | None
    photographs: bool = False


MODELS: Mapping[str, Model] = {
    "resnet20": Model(partial(resnet, 20), 32, "resnet20_cifar10"),
    "resnet56": Model(partial(resnet, 56), 32, "resnet56_cifar10"),
    "mobilenet_v2": Model(MobileNetV2, 224, "mobilenet_v2_imagenet", photographs=True),
    "resnet34": Model(torchvision.models.resnet34, 224, None, photographs=True),
    "resnet50": Model(torchvision.models.resnet50, 224, None, photographs=True),
}
"""ResNet-34 and -50 have no trained weights here: they serve for times only."""


@dataclass(frozen=True)
class Subject:
    """A network and the images to compress it with.

    Attributes:
        name: Of the network.
        model: In evaluation mode.
        images: `[N, 3, H, W]`.
        trained: Whether its weights are trained; else only times mean something.
    """

    name: str
    model: nn.Module
    images: Tensor
    trained: bool


class Notebook:
    """Finished entries of a benchmark in `benchmarks/results/NAME.json`, written one by one as they come.

    Args:
        name: Of the result.
        settings: What the entries depend on; entries kept under other settings are not taken up.
        seed: Noted in the file.
        fresh: Whether to begin anew in any case.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], seed: int, *, fresh: bool = False) -> None:
        self.name, self.seed = name, seed
        self.settings = json.loads(json.dumps(dict(settings)))  # as it comes back: tuples as lists
        found = None if fresh else environment.kept(name, self.settings, "entries")
        self.entries: dict[str, Any] = found or {}

    def put(self, key: str, entry: T) -> T:
        """Keep an entry, JSON-able.

        Raises:
            ArtifactError: The file cannot be written.
        """
        self.entries[key] = entry
        environment.write_result(self.name, {"settings": self.settings, "entries": self.entries}, self.seed)
        return entry

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the entry kept under a key, or make and keep it."""
        return self.entries[key] if key in self.entries else self.put(key, make())


def add_arguments(parser: argparse.ArgumentParser, *, model: str) -> None:
    """Add the options that every speed benchmark has."""
    parser.add_argument("--model", default=model, choices=sorted(MODELS), help="default: %(default)s")
    parser.add_argument("--images", type=int, default=500, help="to compress with (default: %(default)s)")
    parser.add_argument(
        "--random", action="store_true", help="random weights and images: times only, no data"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch; its own number by default")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--data", help="folder of the data; else FXPRUNE_DATA, else ../shared/data")
    parser.add_argument("--out", help="name of the result file")


def settings_of(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return some of the options, and those that every result depends on."""
    return {
        name: getattr(arguments, name) for name in ("model", "images", "random", "device", "seed", *names)
    }


def recipes_of(*names: str) -> dict[str, Any]:
    """Return the settings of some recipes, for results that depend on them."""
    return {"recipes": {name: asdict(recipe_named(name)) for name in names}}


def subject_of(
    name: str, images: int, seed: int, *, random: bool, data_path: str | None = None, size: int | None = None
) -> Subject:
    """Build a network with its images.

    Args:
        name: One of `MODELS`.
        images: How many.
        seed: Of the draw, and of random weights.
        random: Whether weights and images are noise, so that no data are needed.
        data_path: See `benchmarks.data.data_folder`.
        size: Side of the images, where it is not the network's own.

    Raises:
        OptionError: There are not so many images.
        SourceError: The data are not there.
    """
    known = MODELS[name]
    torch.manual_seed(seed)
    model = known.build().eval()
    trained = known.weights is not None and not random
    if known.weights is not None and trained:
        model = data.load_weights(model, known.weights, data_path)
    if random:
        batch = torch.randn(images, 3, known.size, known.size)
    elif known.photographs:
        batch = _photographs(images, seed, data_path)
    else:
        batch = data.few_shot(images, seed, data=data_path)[0]
    if size is not None and size != known.size:
        batch = nn.functional.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
    return Subject(name, model, batch, trained)


def test_images(name: str, data_path: str | None = None) -> data.LabelledImages:
    """Labelled images for one of `MODELS`, none of them among those that it is compressed with.

    Raises:
        SourceError: The data are not there.
    """
    if MODELS[name].photographs:
        return data.photographs("held_out", data_path)
    return data.cifar10_test(data_path)


def shortened(name: str, iterations: int | None) -> Recipe:
    """Return a recipe with so many iterations of adaptors and mimicking both, its own if None."""
    recipe = recipe_named(name)
    if iterations is None:
        return recipe
    adaptor, mimic = (replace(fit, iterations=iterations) for fit in (recipe.adaptor, recipe.mimic))
    return replace(recipe, adaptor=adaptor, mimic=mimic)


def _photographs(images: int, seed: int, data_path: str | None) -> Tensor:
    pool = data.photographs("fit", data_path).images
    if not 1 <= images <= len(pool):
        raise OptionError(f"cannot draw {images} photographs: there are {len(pool)}")
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:images]]


def job_of(
    subject: Subject,
    *,
    recipe: str | Recipe = "fast",
    seed: int,
    device: str = "cpu",
    k: int = 1,
    selection: Selection | None = None,
    backend: Backend = "torch",
) -> Job:
    """Open a compression as `fxprune.compress` does, up to where scoring begins."""
    chosen = recipe_named(recipe)
    options = CompressOptions(
        k=k,
        target_speedup=None,
        target_latency_ms=None,
        min_agreement=None,
        recipe=chosen,
        criterion="recovery",
        selection=selection or chosen.selection,
        backend=backend,
        device=device,
        images=len(subject.images),
        latency_batch=64 if device.startswith("cuda") else 8,
        cache_bytes=2 * 2**30,
        seed=seed,
    )
    calibration = draw(subject.images, limit=len(subject.images), seed=seed)
    return open_job(
        subject.model, calibration, options, kinds=("identity",), ignore=(), tap=None, folder=None, bars=False
    )


def savings_of(job: Job) -> dict[str, Any]:
    """Measure what each region saves, as plain data by label."""
    regions = job.found.regions
    batch = job.calibration.example(job.options.latency_batch).to(job.options.device)
    measured = measure_savings(
        job.original,
        regions,
        batch.tensors(),
        lambda network: network,
        backend=job.options.backend,
        device=job.options.device,
    )
    return {region.label: asdict(one) for region, one in zip(regions, measured, strict=True)}


def reach(job: Job, regions: Sequence[Region], test: data.LabelledImages | None) -> dict[str, Any]:
    """Recover the network without a set, and measure it; `test` serves for the accuracy alone."""
    begun = time.perf_counter()
    recovered, plan = repair(job, DropPlan((), tuple(regions)))
    seconds = time.perf_counter() - begun
    small = recovered.graph.to("cpu")
    return {
        "joint_loss": plan.recovery_loss,  # None where nothing was folded first
        "loss_before": recovered.loss_before,
        "loss_after": recovered.loss_after,
        "accuracy": None if test is None else data.accuracy(small, test.images, test.labels),
        "recovery_seconds": seconds,
    }


def block_scores(
    regions: Sequence[Region], losses: Mapping[str, float], savings: Mapping[str, Any]
) -> tuple[BlockScore, ...]:
    """Join losses and kept savings, both by label, to scores in the regions' order."""
    return tuple(
        BlockScore(region, losses[region.label], float("nan"), _comparison(savings[region.label]))
        for region in regions
    )


def independent_plans(
    regions: Sequence[Region], losses: Mapping[str, float], savings: Mapping[str, Any]
) -> list[tuple[Region, ...]]:
    """Return the independent choices for k = 1, 2, ... by losses and kept savings, both by label."""
    scores = block_scores(regions, losses, savings)
    return list(Planner(scores, lambda sets, plan: [], "independent").path())


def _comparison(kept: Mapping[str, Any]) -> LatencyComparison:
    before, after = (
        Latency(**{**kept[side], "batch_shape": tuple(kept[side]["batch_shape"])})
        for side in ("before", "after")
    )
    interval = Interval(**kept["interval"])
    return LatencyComparison(before, after, kept["ratio"], interval, kept.get("shared_by", 1))


def kept_result(file: str | Path) -> dict[str, Any]:
    """Read an earlier result.

    Raises:
        OptionError: The file is not one.
    """
    try:
        result = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot take figures from {file}: {error}") from error
    if not isinstance(result, dict) or "entries" not in result:
        raise OptionError(f"cannot take figures from {file}: it is no result of these benchmarks")
    return result


def counts(text: str) -> tuple[int, ...]:
    """Parse `100,250` to numbers; an empty text gives none."""
    return tuple(int(part) for part in words(text))


def words(text: str) -> tuple[str, ...]:
    """Parse `a,b` to words; an empty text gives none."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
