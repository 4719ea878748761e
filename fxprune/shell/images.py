"""Folders of photographs: calibration images, drawn and decoded once; labelled ones, decoded batch by batch."""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional
from tqdm.auto import tqdm

from fxprune.errors import OptionError, SourceError

__all__ = [
    "BATCH",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MOST_ASPECT",
    "SUFFIXES",
    "ImageBatches",
    "LabelledFolder",
    "load_images",
    "load_labelled",
]

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH = 50
"""Images in a batch."""
MOST_ASPECT = 20
"""Longer side over shorter side: beyond it, a picture of a few bytes is resized to one of gigabytes."""
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Endings of the files that count as images, in lower case."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatches:
    """Images of one size, to be iterated again and again: kept as bytes, normalised batch by batch.

    Attributes:
        pixels: uint8 [N, 3, height, width].
        paths: The files they came from.
        unreadable: Files that were skipped, each with the reason.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
    """

    pixels: Tensor
    paths: tuple[Path, ...]
    unreadable: tuple[str, ...]
    mean: Sequence[float]
    std: Sequence[float]

    def __len__(self) -> int:
        return -(-len(self.paths) // BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        for pixels in torch.split(self.pixels, BATCH):
            yield _normalised(pixels, self.mean, self.std)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledFolder:
    """Images with their classes, prepared as `load_images` does and decoded anew whenever they are iterated over.

    Attributes:
        paths: The files, class by class.
        labels: The index of each one's class.
        size: Height and width in pixels.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of float32 `[N, 3, height, width]` and int64 `[N]`.

        Raises:
            SourceError: A file cannot be read as an image; it is named.
        """
        for start in range(0, len(self.paths), BATCH):
            rows = slice(start, start + BATCH)
            pixels = torch.stack([self._decode(path) for path in self.paths[rows]])
            yield _normalised(pixels, self.mean, self.std), torch.tensor(self.labels[rows])

    def _decode(self, path: Path) -> Tensor:
        try:
            with _no_bombs():
                return _decode(path, self.size)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever a damaged file leads them into
            raise SourceError(
                f"{path} cannot be read as an image ({error}): repair it or take it out, so that it is clear which "
                "images the accuracy is measured on"
            ) from error


def load_images(
    folder: str | Path,
    *,
    size: int | tuple[int, int] = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    limit: int = 500,
    seed: int = 0,
    progress: bool = False,
) -> ImageBatches:
    """Draws images from a folder, nested or flat, and prepares them as for evaluation on ImageNet.

    Each is converted to RGB, resized until it just covers 256/224 of `size`, the centre cropped to `size`, scaled to
    [0, 1] and normalised. A file that cannot be decoded, is longer than `MOST_ASPECT` times its breadth, or has more
    than `PIL.Image.MAX_IMAGE_PIXELS` pixels is logged, listed in `unreadable`, and another one drawn in its place.

    Args:
        folder: Searched with all folders below it; hidden files are left out, folder names (labels) not used.
        size: Height and width in pixels; one number where they are the same.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        limit: Images to draw, or all if there are fewer.
        seed: Fixes the draw.
        progress: Whether to show a progress bar on stderr.

    Raises:
        OptionError: A number is out of range.
        SourceError: The folder is missing, or holds no image that can be read.
    """
    sides = _sides(size)
    if limit < 1:
        raise OptionError(f"limit is {limit}: give 1 or more.")
    _check_channels(mean, std)
    candidates = _image_files(Path(folder))
    random.Random(seed).shuffle(candidates)
    images: dict[Path, Tensor] = {}
    unreadable: list[str] = []
    wanted = min(limit, len(candidates))
    bar = tqdm(total=wanted, desc="reading images", unit="image", disable=not progress, leave=False)
    with bar, _no_bombs():
        for path in candidates:
            if len(images) == limit:
                break
            try:
                images[path] = _decode(path, sides)
            except MemoryError:
                raise
            except Exception as error:  # decoders raise whatever a damaged file leads them into
                logger.warning("Skipped %s: it cannot be read as an image (%s).", path, error)
                unreadable.append(f"{path}: {error}")
            else:
                bar.update()
    if not images:
        raise SourceError(
            f"None of the {len(unreadable)} image files in {folder} can be read, for instance {unreadable[0]}."
        )
    logger.info("Read %d of %d images in %s.", len(images), len(candidates), folder)
    return ImageBatches(torch.stack([*images.values()]), (*images,), (*unreadable,), mean, std)


def load_labelled(
    folder: str | Path,
    *,
    size: int | tuple[int, int] = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> LabelledFolder:
    """All images of a folder that holds one folder for each class (ImageFolder's layout).

    Args:
        folder: Folders directly below it are the classes, hidden ones left out; in the order of their names they are
            the network's outputs, an empty one too. Images are searched for in each and in all folders below it.
        size: As for `load_images`.
        mean: As for `load_images`.
        std: As for `load_images`.

    Raises:
        OptionError: A number is out of range.
        SourceError: The folder is missing, or holds no folders, or these hold no images.
    """
    sides = _sides(size)
    _check_channels(mean, std)
    files = _image_files(Path(folder))
    classes = sorted(
        path.name for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    index = {name: label for label, name in enumerate(classes)}
    found = [(path.relative_to(folder).parts, path) for path in files]
    labelled = [(index[parts[0]], path) for parts, path in found if len(parts) > 1 and parts[0] in index]
    if not labelled:
        raise SourceError(
            f"The folder {folder} holds no labelled images: it must hold one folder for each class, with the class's "
            "images inside."
        )
    labelled.sort()
    labels, paths = zip(*labelled, strict=True)
    return LabelledFolder(paths, labels, sides, mean, std)


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise OptionError(f"size is {size}: give 1 or more.")
    return height, width


def _check_channels(mean: Sequence[float], std: Sequence[float]) -> None:
    if (len(mean), len(std)) != (3, 3) or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise OptionError(
            f"mean is {tuple(mean)} and std {tuple(std)}: give three finite numbers each, for red, green and blue, "
            "and standard deviations above 0."
        )


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 images out of uint8 ones."""
    normalised: Tensor = functional.normalize(pixels.float() / 255, mean, std)
    return normalised


@contextmanager
def _no_bombs() -> Iterator[None]:
    """Makes an error of a picture with more pixels than Pillow holds to be sane."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise SourceError(f"The image folder {folder} {kind}: give a folder of {', '.join(SUFFIXES)} files.")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise SourceError(f"The folder {folder} holds no image: files must end in {', '.join(SUFFIXES)}.")
    return files


def _decode(path: Path, size: tuple[int, int]) -> Tensor:
    """One image as uint8 [3, *size]; its own size is looked at before its pixels are read."""
    with Image.open(path) as file:
        if max(file.size) > MOST_ASPECT * min(file.size):
            raise ValueError(
                f"{file.width} x {file.height} pixels, over {MOST_ASPECT} times as long as broad"
            )
        image = file.convert("RGB")
    scale = max(size[0] / image.height, size[1] / image.width)
    shorter = round(scale * min(image.size) * 256 / 224)
    image = functional.center_crop(functional.resize(image, shorter), list(size))
    return torch.as_tensor(functional.pil_to_tensor(image))
