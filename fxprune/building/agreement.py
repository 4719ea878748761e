"""Whether a graph computes what onnxruntime computes from the file: on noise, at several batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.building.file import FileInput, OnnxFile, unreadable
from fxprune.errors import FxpruneError, OptionError, SourceError
from fxprune.export.messages import innermost
from fxprune.export.parity import BATCH_SIZES
from fxprune.export.running import tensors_of
from fxprune.runtimes import onnxruntime

__all__ = ["Trials", "answers", "compare", "open_file", "trials_of"]

_SIZE = 224
"""Height and width that a file is tried with where it leaves them free."""
_TOLERANCE, _TOLERANCE_HALF = 1e-4, 5e-3
"""Of an output's largest value, or of `_LEAST`: a thousand classes that are all as likely have no more."""
_LEAST = 1e-3


@dataclass(frozen=True, slots=True)
class Trials:
    """Shapes in which a network is tried, one for each input.

    Attributes:
        batch: The only batch size of the file, None where it takes any.
        first: Shapes at one batch size.
        second: Shapes at another one, with other sizes too where the file leaves them free.
    """

    batch: int | None
    first: tuple[tuple[int, ...], ...]
    second: tuple[tuple[int, ...], ...]


def trials_of(file: OnnxFile, given: Sequence[Sequence[int]], *, fixed: bool = False) -> Trials:
    """Shapes to try a file with.

    Args:
        file: The file.
        given: Shapes that the user gave, one for each input; none where those of the file will do.
        fixed: Whether all sizes but the batch are the same in both trials.

    Raises:
        OptionError: They do not fit the file, or are needed and not given.
        SourceError: The file's inputs have no batch, or several.
    """
    if given and len(given) != len(file.inputs):
        names = ", ".join(entry.name for entry in file.inputs)
        raise OptionError(
            f"{file.path} has {len(file.inputs)} inputs ({names}), and {len(given)} shapes were given"
        )
    batches = {entry.shape[0] if entry.shape else None for entry in file.inputs}
    if len(batches) > 1:
        raise unreadable(
            file.path, f"its inputs have batches of {', '.join(map(str, batches))}; one has to do for all"
        )
    batch = batches.pop()
    both = []
    for place, entry in enumerate(file.inputs):
        wanted = tuple(given[place]) if given else (None,) * len(entry.shape)
        if not entry.shape:
            raise unreadable(file.path, f"its input {entry.name} has no batch dimension")
        if len(wanted) != len(entry.shape):
            raise OptionError(
                f"input {entry.name} of {file.path} has {len(entry.shape)} dimensions, not {len(wanted)}"
            )
        both.append([_sizes(entry, file.path, wanted, trial, batch) for trial in (0, 1)])
    first, second = zip(*both, strict=True)
    if fixed:
        second = tuple((two[0], *one[1:]) for one, two in zip(first, second, strict=True))
    return Trials(batch, tuple(first), tuple(second))


def _sizes(
    entry: FileInput, path: str, wanted: tuple[int | None, ...], trial: int, batch: int | None
) -> tuple[int, ...]:
    """Sizes of one input; in the second trial every free one is another, and so is the batch."""
    sizes = [(2 + trial) if batch is None else batch * (1 + trial)]
    for dim, (own, asked) in list(enumerate(zip(entry.shape, wanted, strict=True)))[1:]:
        if own is not None and asked not in (None, own):
            raise OptionError(
                f"input {entry.name} of {path} has the fixed size {own} in dimension {dim}, not {asked}"
            )
        if own is None and asked is None and (dim == 1 or len(entry.shape) != 4):
            raise OptionError(f"input {entry.name} of {path} leaves dimension {dim} free: give input_shapes")
        sizes.append(own or (asked or _SIZE) * (1 + trial))
    return tuple(sizes)


def open_file(file: OnnxFile) -> Any:
    """A session of onnxruntime, which checks the whole file.

    Raises:
        SourceError: It refuses the file.
    """
    try:
        return onnxruntime.open_session(
            file.path, device="cpu", threads=torch.get_num_threads(), optimised=False
        )
    except FxpruneError as error:
        raise SourceError(str(error)) from error


def answers(session: Any, file: OnnxFile, shapes: Trials, size: int) -> tuple[list[Tensor], list[Any]]:
    """Noise of a batch size, and what the file makes of it: a list for each of the batches that it takes.

    Raises:
        SourceError: It does not run on it.
    """
    inputs = [
        _noise((size, *shape[1:]), entry.dtype, seed=size)
        for entry, shape in zip(file.inputs, shapes.first, strict=True)
    ]
    parts = zip(*(torch.split(x, shapes.batch or size) for x in inputs), strict=True)
    try:
        return inputs, [onnxruntime.run(session, part) for part in parts]
    except FxpruneError as error:
        sizes = ", ".join(str(tuple(x.shape)) for x in inputs)
        free = any(None in entry.shape[1:] for entry in file.inputs)
        more = ", or give input_shapes that it takes" if free else ""
        raise unreadable(
            file.path,
            f"onnxruntime cannot run it on inputs of {sizes} ({innermost(error)}). Export the network again, for any "
            f"batch size{more}",
        ) from error


@torch.no_grad()
def compare(gm: fx.GraphModule, session: Any, file: OnnxFile, shapes: Trials) -> None:
    """Runs graph and file on the same noise at several batch sizes; a file for one batch size sees it part by part."""
    for size in (shapes.batch, 3 * shapes.batch) if shapes.batch else BATCH_SIZES:
        inputs, expected = answers(session, file, shapes, size)
        try:
            found = [x.numpy() for x in tensors_of(gm(*inputs))]
        except Exception as error:  # the graph was built with other sizes, and without values
            raise _differs(file, size, innermost(error)) from error
        for name, mine, *theirs in zip(file.outputs, found, *expected, strict=True):
            _require_equal(file, size, name, mine, theirs)


def _require_equal(file: OnnxFile, size: int, name: str, mine: Any, theirs: Sequence[Any]) -> None:
    longer = next((d for d, n in enumerate(mine.shape) if n != theirs[0].shape[d]), 0) if mine.shape else 0
    wanted = np.concatenate(theirs, axis=longer) if len(theirs) > 1 else theirs[0]
    if mine.shape != wanted.shape:
        raise _differs(file, size, f"{name} has the shape {mine.shape} instead of {wanted.shape}")
    tolerance = _TOLERANCE_HALF if mine.dtype == np.float16 else _TOLERANCE
    wanted, mine = wanted.astype(np.float64), mine.astype(np.float64)
    scale = max(_LEAST, float(np.abs(wanted).max(initial=0.0)))
    worst = float(np.abs(mine - wanted).max(initial=0.0)) / scale
    if not worst <= tolerance:
        raise _differs(file, size, f"{name} is off by {worst:.3g} of its largest value")


def _differs(file: OnnxFile, size: int, what: str) -> SourceError:
    return unreadable(
        file.path,
        f"the graph computes something else than onnxruntime on a batch of {size}: {what}. Export the network again "
        "with a free batch dimension; if it has one, this is a defect to report",
    )


def _noise(shape: Sequence[int], dtype: torch.dtype, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values.to(dtype) if dtype.is_floating_point else torch.zeros(*shape, dtype=dtype)
