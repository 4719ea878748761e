"""Labelled images, where the user has some: networks are measured on them, and nothing is ever fitted to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.loading import iterate
from fxprune.calibration.reading import NO_NAMES, check_batch, read_batch
from fxprune.errors import CalibrationError
from fxprune.graph.call import Inputs
from fxprune.options import Options

__all__ = ["LabelledImages"]

_PAIRS = "every batch must be a pair (inputs, labels); a single pair goes into a list"


class LabelledImages:
    """A loader of images with their classes; iterating reads it anew, for every network that is measured.

    Args:
        loader: Batches `(inputs, labels)`, or a `Dataset` of such pairs. The inputs are read as those of calibration
            images are; labels are whole numbers `[N]`, the indices of the network's outputs.
        like: The calibration images, which these must be like in shape and type.
        options: What was asked for; its `input_fn` is given the whole pair.
        names: The network's inputs by name, and whether each is required.

    Raises:
        CalibrationError: The loader is a path, or can be read only once.
    """

    def __init__(
        self, loader: object, like: CalibrationSet, options: Options, names: Mapping[str, bool] = NO_NAMES
    ) -> None:
        if isinstance(loader, (str, os.PathLike)):
            raise CalibrationError(
                f"labels is the path {os.fspath(loader)!r}, which does not tell how its images are to be prepared: "
                "give a loader, for instance DataLoader(ImageFolder(path, transform)) with the transform of the "
                "calibration images"
            )
        if isinstance(loader, Iterator):
            raise CalibrationError(
                f"labels is a {type(loader).__name__}, which can be read only once, but every network is measured on "
                "it: give the loader itself, or a list of its batches"
            )
        self._loader = DataLoader(loader, batch_size=32) if isinstance(loader, Dataset) else loader
        self._shapes = _shapes(like.inputs)
        self._input_fn, self._names = options.input_fn, names

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        """The batches, each with its labels.

        Raises:
            CalibrationError: The loader fails or is empty, or a batch cannot be used; the message names it.
        """
        index = -1
        try:
            for index, batch in iterate(self._loader):
                yield self._read(batch, index)
        except CalibrationError as error:
            raise error.within("labels") from error
        if index < 0:
            raise CalibrationError(
                "labels: the loader yields no batch: give at least one image with its label"
            )

    def _read(self, batch: Any, index: int) -> tuple[Inputs, Tensor]:
        pair = isinstance(batch, (tuple, list)) and len(batch) > 1
        if not pair or not isinstance(batch[1], Tensor):
            what = f"holds a {type(batch[1]).__name__}" if pair else f"is a {type(batch).__name__}"
            raise CalibrationError(f"batch {index} {what} and no tensor of labels: {_PAIRS}")
        given = batch[0] if self._input_fn is None else batch
        inputs = read_batch(given, index, names=self._names, input_fn=self._input_fn)
        check_batch(inputs, index)
        if _shapes(inputs) != self._shapes:
            raise CalibrationError(
                f"batch {index} holds images of {_shapes(inputs)}, the calibration images are of {self._shapes}: "
                "prepare both alike"
            )
        labels: Tensor = batch[1]
        if labels.ndim != 1 or labels.dtype not in (
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
        ):
            raise CalibrationError(
                f"the labels of batch {index} are {labels.dtype} of shape {tuple(labels.shape)}: give one whole number "
                "for each image, the index of its class among the network's outputs"
            )
        if len(labels) != inputs.batch_size:
            raise CalibrationError(f"batch {index} holds {inputs.batch_size} images and {len(labels)} labels")
        return inputs, labels.long()


def _shapes(inputs: Inputs) -> str:
    """Shape and type of one image, for comparing and for messages."""
    return ", ".join(f"{tuple(t.shape[1:])} {t.dtype}" for t in inputs.tensors())
