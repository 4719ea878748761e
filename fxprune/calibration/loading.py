"""Going through a loader: one that need not read every image to give a few, and that fails in words."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from fxprune.errors import CalibrationError, FxpruneError

__all__ = ["RESIZE", "iterate", "narrow"]

logger = logging.getLogger(__name__)

RESIZE = "Resize and crop all images to one size, for instance with torchvision.transforms."
"""What to do about images of mixed sizes."""


def narrow(loader: object, limit: int, seed: int) -> tuple[object, list[int] | None]:
    """What to iterate over instead: where a dataset lies below, only `limit` drawn images are loaded.

    Returns:
        The loader to read, and the indices in the dataset of what it will give, where some were drawn.

    Raises:
        CalibrationError: The loader is a mapping or a string.
    """
    if isinstance(loader, Tensor):
        return [loader], None
    if isinstance(loader, (Mapping, str, bytes)):
        raise CalibrationError(
            f"The loader is a {type(loader).__name__}: give an iterable of batches, a tensor [N, C, H, W] or "
            "a Dataset (a single batch goes into a list)."
        )
    if isinstance(loader, Dataset):
        loader = DataLoader(loader, batch_size=32)
    # a subclass may mean something else by iterating, so it is taken as it is
    count = _count(loader) if type(loader) is DataLoader else None
    if count is None or count <= limit:
        return loader, None
    assert isinstance(loader, DataLoader)
    indices = sorted(random.Random(seed).sample(range(count), limit))
    logger.info("Drew %d calibration images out of %d.", limit, count)
    drawn: DataLoader[Any] = DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    return drawn, indices


def _count(loader: DataLoader[Any]) -> int | None:
    """Number of items, if the loader yields each item of a sized dataset once; else None."""
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler: Any = loader.sampler
    shuffled = type(sampler) is RandomSampler and not sampler.replacement
    if not (shuffled or type(sampler) is SequentialSampler) or not isinstance(loader.dataset, Sized):
        return None
    count = len(loader.dataset)
    return count if len(sampler) == count else None


def iterate(loader: Any) -> Iterator[tuple[int, Any]]:
    """The loader's batches with their numbers.

    Raises:
        CalibrationError: The loader is not iterable, or raised something that is no `FxpruneError`.
    """
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise CalibrationError(
            f"The loader, a {type(loader).__name__}, is not an iterable of batches ({error}): give a "
            "DataLoader, a list of batches, a tensor [N, C, H, W] or a Dataset."
        ) from error
    index = 0
    try:
        for batch in iterator:
            yield index, batch
            index += 1
    except FxpruneError:
        raise
    except Exception as error:
        advice = f" {RESIZE}" if "equal size" in str(error) else ""
        raise CalibrationError(
            f"The loader failed at batch {index}: {type(error).__name__}: {error}{advice}"
        ) from error
