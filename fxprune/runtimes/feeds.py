"""What a runtime is fed: arrays in the order of a network's own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fxprune.errors import MeasurementError

__all__ = ["Array", "Values", "arrays"]

Array: TypeAlias = npt.NDArray[np.generic]
Values: TypeAlias = "Tensor | Array"


def arrays(inputs: Sequence[Values], names: Sequence[str]) -> list[Array]:
    """The inputs on the CPU, each in one piece.

    Args:
        inputs: What a network is given.
        names: Its own inputs.

    Raises:
        MeasurementError: It takes another number of inputs.
    """
    if len(names) != len(inputs):
        raise MeasurementError(
            f"the ONNX network takes {len(names)} inputs ({', '.join(names)}), {len(inputs)} were given"
        )
    values = (x.detach().cpu().numpy() if isinstance(x, Tensor) else x for x in inputs)
    return [np.ascontiguousarray(value) for value in values]
