"""The measured data: CIFAR-10, photographs, and the weights that go with them, from a folder of the user's.

The folder is named by `--data`, else by the environment variable `FXPRUNE_DATA`, else it is `../shared/data`
beside the repository. It holds `cifar10/{train,test}/CLASS/*.png`, `photos/{fit,held_out}/LABEL_*.jpg` and
`weights/*.pt`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, functional

from fxprune.errors import CalibrationError, OptionError, SourceError

__all__ = [
    "LabelledImages",
    "accuracy",
    "agreement",
    "cifar10_test",
    "data_folder",
    "few_photographs",
    "few_shot",
    "load_weights",
    "photographs",
    "predictions",
    "share",
]

VARIABLE = "FXPRUNE_DATA"
DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images as the network wants them, and their classes.

    Attributes:
        images: `[N, 3, H, W]`, float32, normalised.
        labels: `[N]`, int64.
    """

    images: Tensor
    labels: Tensor


def data_folder(data: str | Path | None = None) -> Path:
    """Finds the data folder.

    Raises:
        SourceError: If it is not there.
    """
    folder = Path(data or os.environ.get(VARIABLE) or DEFAULT)
    if not folder.is_dir():
        raise SourceError(
            f"no benchmark data at {folder}: it is needed to measure on real images; "
            f"name its folder with --data or the environment variable {VARIABLE}"
        )
    return folder


def cifar10_test(data: str | Path | None = None) -> LabelledImages:
    """Loads the CIFAR-10 test set: 10,000 images `[N, 3, 32, 32]`."""
    files, labels = _cifar10_files(data, "test")
    return LabelledImages(_load(files, _read_cifar10), torch.tensor(labels))


def few_shot(
    images: int, seed: int, *, held_back: int = 0, data: str | Path | None = None
) -> tuple[Tensor, LabelledImages]:
    """Draws calibration images from the CIFAR-10 training pool, classes ignored.

    For one seed, a smaller draw is the beginning of a larger one, and the held-back images stay the same.

    Args:
        images: How many to draw.
        seed: Of the draw.
        held_back: How many others to draw with their labels, for choices that must not see the test set.
        data: See `data_folder`.

    Returns:
        The calibration images `[images, 3, 32, 32]`, and the held-back ones; the two have nothing in common.

    Raises:
        OptionError: If the pool is too small.
    """
    files, labels = _cifar10_files(data, "train")
    if images < 1 or held_back < 0 or images + held_back > len(files):
        raise OptionError(
            f"cannot draw {images} images and hold back {held_back}: the pool has {len(files)} in all"
        )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn, held = order[:images], order[len(order) - held_back :]
    calibration = _load([files[i] for i in drawn], _read_cifar10)
    kept = _load([files[i] for i in held], _read_cifar10) if held else calibration.new_empty((0, 3, 32, 32))
    return calibration, LabelledImages(kept, torch.tensor([labels[i] for i in held], dtype=torch.long))


@dataclass(frozen=True)
class Photographs:
    """How a network wants its photographs.

    Attributes:
        bicubic: Whether they are resized so; else bilinearly.
        middle: The grey level, of 0 to 255, that becomes 0.
        scale: Grey levels to one.
        background: Whether class 0 is none of ImageNet's.
    """

    bicubic: bool = False
    middle: float = 127.5
    scale: float = 127.5
    background: bool = True


def photographs(
    part: str, data: str | Path | None = None, wanted: Photographs = Photographs()
) -> LabelledImages:
    """Loads photographs `[N, 3, 224, 224]`; a file name begins with its class, counted from 1.

    Args:
        part: `fit` (500, to compress with) or `held_out` (200 of other classes, to report on).
        data: See `data_folder`.
        wanted: How.

    Raises:
        SourceError: If there are none.
    """
    files = _files(data_folder(data) / "photos" / part, "*.jpg")
    labels = [int(file.name.split("_")[0]) - (not wanted.background) for file in files]
    return LabelledImages(_load(files, partial(_read_photograph, wanted=wanted)), torch.tensor(labels))


def few_photographs(
    images: int, seed: int, *, data: str | Path | None = None, wanted: Photographs = Photographs()
) -> Tensor:
    """Draws photographs `[images, 3, 224, 224]` to compress with; a smaller draw begins a larger one of its seed.

    Raises:
        OptionError: There are not so many.
    """
    pool = photographs("fit", data, wanted).images
    if not 1 <= images <= len(pool):
        raise OptionError(f"cannot draw {images} photographs: there are {len(pool)}")
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:images]]


def load_weights(model: nn.Module, name: str, data: str | Path | None = None) -> nn.Module:
    """Loads `weights/NAME.pt` into a network: float32, evaluation mode, laid out channels last.

    That layout makes torch's convolutions on a CPU faster, in training and in serving, so it is the fairer
    original to compare with (docs/decisions/0008-channels-last-originals.md).

    Raises:
        SourceError: If the file is not there, or its keys are not the network's.
    """
    file = data_folder(data) / "weights" / f"{name}.pt"
    if not file.is_file():
        raise SourceError(f"no weights at {file}: they are needed to measure a trained network")
    state = torch.load(file, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    except RuntimeError as error:
        raise SourceError(f"the weights of {file} do not fit: {error}") from error
    # Published weights may lack batch norm's counter of batches; evaluation never reads it.
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    different = (set(model.state_dict()) - counters) ^ (set(state) - counters)
    if different:
        raise SourceError(f"the keys of {file} are not the network's: {', '.join(sorted(different)[:8])}")
    return model.eval().to(memory_format=torch.channels_last)


def predictions(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """Returns the likeliest class `[N]` of each image `[N, C, H, W]`; puts the network in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(1) for batch in torch.split(images, batch_size)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Returns the share of images `[N, C, H, W]` whose most likely class is their label `[N]`, in [0, 1]."""
    return share(predictions(model, images, batch_size) == labels)


def agreement(a: nn.Module, b: nn.Module, images: Tensor, batch_size: int = 250) -> float:
    """Returns the share of images `[N, C, H, W]` on which two networks name the same class, in [0, 1]."""
    return share(predictions(a, images, batch_size) == predictions(b, images, batch_size))


def share(hits: Tensor) -> float:
    """Returns the share of true entries of `[N]`, exactly, in [0, 1]."""
    return int(hits.sum()) / len(hits)


def _cifar10_files(data: str | Path | None, part: str) -> tuple[list[Path], list[int]]:
    folder = data_folder(data) / "cifar10" / part
    classes = sorted(path.name for path in folder.glob("*") if path.is_dir())
    pairs = [(file, i) for i, name in enumerate(classes) for file in _files(folder / name, "*.png")]
    if not pairs:
        raise SourceError(f"no CIFAR-10 images under {folder}: expected one folder of PNG files a class")
    files, labels = zip(*pairs, strict=True)
    return list(files), list(labels)


def _files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise SourceError(f"no images {pattern} in {folder}: the benchmark cannot measure without them")
    return files


def _load(files: Sequence[Path], read: Callable[[Path], Tensor]) -> Tensor:
    """Reads files in parallel (decoding releases the interpreter lock) into `[N, 3, H, W]`."""
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) * 2)) as pool:
        return torch.stack(list(pool.map(read, files, chunksize=64)))


def _read_cifar10(file: Path) -> Tensor:
    pixels = _pixels(_open(file))
    return (pixels - torch.tensor(CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR_STD).view(3, 1, 1)


def _read_photograph(file: Path, wanted: Photographs) -> Tensor:
    how = InterpolationMode.BICUBIC if wanted.bicubic else InterpolationMode.BILINEAR
    image = functional.center_crop(functional.resize(_open(file), [256], how), [224])
    return (_pixels(image) * 255.0 - wanted.middle) / wanted.scale


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise CalibrationError(f"cannot read the image {file}: {error}") from error


def _pixels(image: Image.Image) -> Tensor:
    """Converts an image to `[3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
