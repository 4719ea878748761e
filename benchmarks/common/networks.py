"""The networks that are measured, each with the images to compress it with and those to judge it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.common import data
from benchmarks.models.cifar_resnet import resnet
from benchmarks.models.efficientnet_lite import EfficientNetLite0
from benchmarks.models.mobilenet_v2 import MobileNetV2

__all__ = ["MODELS", "Model", "Subject", "subject_of", "test_images"]


@dataclass(frozen=True)
class Model:
    """How a network and its images are made.

    Attributes:
        build: Makes the network, weights random; where it has trained weights, `without=` leaves blocks out.
        size: Side of its images.
        weights: Name of its trained weights, None where there are none.
        photographs: How it wants its photographs; None for a network of CIFAR-10's images.
    """

    build: Callable[..., nn.Module]
    size: int
    weights: str | None
    photographs: data.Photographs | None = None


MODELS: Mapping[str, Model] = {
    "resnet20": Model(partial(resnet, 20), 32, "resnet20_cifar10"),
    "resnet56": Model(partial(resnet, 56), 32, "resnet56_cifar10"),
    "mobilenet_v2": Model(MobileNetV2, 224, "mobilenet_v2_imagenet", data.Photographs()),
    "efficientnet_lite0": Model(
        EfficientNetLite0,
        224,
        "efficientnet_lite0_imagenet",
        data.Photographs(bicubic=True, middle=127.0, scale=128.0, background=False),
    ),
    "resnet34": Model(torchvision.models.resnet34, 224, None, data.Photographs()),
    "resnet50": Model(torchvision.models.resnet50, 224, None, data.Photographs()),
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


def subject_of(
    name: str, images: int, seed: int, *, random: bool, data_path: str | None = None, size: int | None = None
) -> Subject:
    """Builds a network with its images.

    Args:
        name: One of `MODELS`.
        images: How many.
        seed: Of the draw, and of random weights.
        random: Whether weights and images are noise, so that no data are needed.
        data_path: See `benchmarks.common.data.data_folder`.
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
    elif known.photographs is not None:
        batch = data.few_photographs(images, seed, data=data_path, wanted=known.photographs)
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
    wanted = MODELS[name].photographs
    if wanted is not None:
        return data.photographs("held_out", data_path, wanted)
    return data.cifar10_test(data_path)
