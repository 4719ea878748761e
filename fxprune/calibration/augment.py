"""Random crops, flips and mixtures of images: no labels are needed, for the teacher answers whatever comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from fxprune.errors import OptionError
from fxprune.graph.call import Calls, Inputs

__all__ = ["Augmentation", "augmentable", "augmentation", "cutmix", "random_crop_flip"]

Augmentation: TypeAlias = Callable[[Inputs, Generator], Inputs]
"""Gives a batch of the same shapes; draws its random numbers from the generator only."""


def random_crop_flip(images: Tensor, generator: Generator, *, padding: int | None = None) -> Tensor:
    """Shifts each image by up to `padding` pixels each way and mirrors every second one, left to right.

    This is the usual crop out of a padded image. The border is filled by reflection, so that no edge
    appears that calibration images never had.

    Args:
        images: [B, C, H, W] on any device.
        generator: Source of all random numbers; they are drawn on its device, so that a CPU generator gives
            the same crops whatever device the images are on.
        padding: Largest shift in pixels; the default is 4 at 32 pixels (the practice on CIFAR) and grows
            with the height: `max(1, round(H / 8))`, at most `H - 1` and `W - 1`.

    Returns:
        A new tensor of the same shape, type and device.

    Raises:
        OptionError: `images` is not four-dimensional, or `padding` is negative or reaches beyond the image.
    """
    if images.ndim != 4:
        raise OptionError(
            f"random_crop_flip takes images [B, C, H, W], not a tensor of shape {tuple(images.shape)}."
        )
    count, _, height, width = images.shape
    if padding is None:
        shifts = tuple(min(max(1, round(height / 8)), extent - 1) for extent in (height, width))
    elif 0 <= padding < min(height, width):
        shifts = (padding, padding)
    else:
        raise OptionError(
            f"padding is {padding}: give 0 to {min(height, width) - 1} for images {height}x{width}."
        )
    rows = _source(count, height, shifts[0], generator)
    columns = _source(count, width, shifts[1], generator)
    flipped = torch.rand(count, 1, generator=generator, device=generator.device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    # two gathers: neither a padded copy nor a loop over images
    rows, columns = rows.to(images.device), columns.to(images.device)
    shifted = images.gather(2, rows[:, None, :, None].expand(images.shape))
    return shifted.gather(3, columns[:, None, None, :].expand(images.shape))


def _source(count: int, extent: int, shift: int, generator: Generator) -> Tensor:
    """The pixel to take, for each image and pixel along one dimension: [count, extent], reflected."""
    device = generator.device
    offsets = torch.randint(-shift, shift + 1, (count, 1), generator=generator, device=device)
    positions = (torch.arange(extent, device=device) + offsets).abs()
    last = extent - 1
    return last - (last - positions).abs()


def cutmix(images: Tensor, generator: Generator) -> Tensor:
    """Replaces a box in each image by the same box of another image of the batch (CutMix, Yun et al. 2019).

    Sides of the box are between a quarter and three quarters of the image's, a quarter of its area on average.

    Args:
        images: [B, C, H, W] on any device.
        generator: Source of all random numbers, as in `random_crop_flip`.

    Returns:
        A new tensor of the same shape, type and device.

    Raises:
        OptionError: `images` is not four-dimensional.
    """
    if images.ndim != 4:
        raise OptionError(f"cutmix takes images [B, C, H, W], not a tensor of shape {tuple(images.shape)}.")
    count, _, height, width = images.shape
    partners = torch.randperm(count, generator=generator, device=generator.device).to(images.device)
    rows = _span(count, height, generator).to(images.device)
    columns = _span(count, width, generator).to(images.device)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], images[partners], images)


def _span(count: int, extent: int, generator: Generator) -> Tensor:
    """Which pixels along one dimension lie in the box of each image: [count, extent]."""
    device = generator.device
    shortest, longest = extent // 4, 3 * extent // 4
    lengths = torch.randint(shortest, longest + 1, (count, 1), generator=generator, device=device)
    starts = (torch.rand(count, 1, generator=generator, device=device) * (extent - lengths + 1)).long()
    positions = torch.arange(extent, device=device)
    return (starts <= positions) & (positions < starts + lengths)


def augmentable(inputs: Inputs) -> Tensor | None:
    """The one tensor of a batch that may be changed at random, None where there is none.

    It is the only four-dimensional one, floating-point with the channels first. Batches with several such tensors
    (image and mask, two frames: they may have to stay aligned), with none (tokens), and with the channels last (at
    most 4 in the last dimension, more in dimension 1) have none.
    """
    found = [leaf for leaf in inputs.tensors() if leaf.ndim == 4]
    if len(found) != 1 or found[0].shape[3] <= 4 < found[0].shape[1] or not found[0].is_floating_point():
        return None
    return found[0]


def augmentation(*, crop_flip: bool, mix: bool) -> Augmentation | None:
    """What changes batches at random: `random_crop_flip`, `cutmix`, both or, as None, neither.

    Batches without an `augmentable` tensor are left unchanged; of a batch for several networks each call is one.
    """
    if not crop_flip and not mix:
        return None

    def augment(inputs: Inputs, generator: Generator) -> Inputs:
        if isinstance(inputs, Calls):
            return Calls.of(augment(call, generator) for call in inputs.calls)
        found = augmentable(inputs)
        if found is None:
            return inputs
        images = found
        if crop_flip:
            images = random_crop_flip(images, generator)
        if mix:
            images = cutmix(images, generator)
        return inputs.map(lambda leaf: images if leaf is found else leaf)

    return augment
