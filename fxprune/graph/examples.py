"""What a network is called with, described in JSON, and made again of noise: no image travels with a network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ArtifactError
from fxprune.graph.call import Inputs

__all__ = ["describe", "example_for", "example_of"]

_MOST_VALUES = 2**28
"""In one tensor: a GiB of float32."""
_PLAIN = (bool, int, float, str, type(None))


def describe(inputs: Inputs) -> dict[str, Any] | None:
    """Shapes and types of inputs; scalars, and what is no tensor, as they are. None where JSON cannot say one."""
    try:
        return {"args": [_described(x) for x in inputs.args], "kwargs": _described(inputs.kwargs)["dict"]}
    except TypeError:
        return None


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        kind = {"dtype": str(value.dtype).removeprefix("torch.")}
        return {"shape": list(value.shape), **kind} if value.dim() else {"scalar": value.item(), **kind}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(x) for x in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(x) for key, x in value.items()}}
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(type(value).__name__)


def example_of(description: Any) -> Inputs:
    """Inputs of the shapes and types that `describe` wrote, filled with the same noise each time.

    Raises:
        ArtifactError: The description is malformed, or its tensors are absurdly large.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        args = tuple(_example(x, generator) for x in description["args"])
        return Inputs(args, {key: _example(x, generator) for key, x in description["kwargs"].items()})
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError, RecursionError) as error:
        raise ArtifactError(f"the plan describes no inputs that a network could take ({error})") from error


def example_for(network: nn.Module, description: Any) -> Inputs:
    """`example_of`, where the network is, and of the type of its weights if they have one type."""
    example = example_of(description)
    weights = [x for x in network.parameters() if x.is_floating_point()]
    if len({x.dtype for x in weights}) == 1:
        example = example.map(lambda x: x.to(weights[0].dtype) if x.is_floating_point() else x)
    return example.to(weights[0].device) if weights else example


def _example(described: Any, generator: torch.Generator) -> Any:
    if not isinstance(described, dict):
        return described
    if "dtype" not in described:
        ((kind, parts),) = described.items()
        if kind == "dict":
            return {key: _example(x, generator) for key, x in parts.items()}
        return {"list": list, "tuple": tuple}[kind]([_example(x, generator) for x in parts])
    dtype = getattr(torch, described["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{described['dtype']!r} is no type of tensor")
    if "scalar" in described:
        return torch.tensor(described["scalar"], dtype=dtype)
    shape = described["shape"]
    if math.prod(shape) > _MOST_VALUES:
        raise ValueError(f"a tensor of shape {shape}")
    noise = dtype.is_floating_point or dtype.is_complex
    return torch.randn(shape, generator=generator).to(dtype) if noise else torch.zeros(shape, dtype=dtype)
