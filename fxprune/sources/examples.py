"""Networks by name, ready to be called with tensors in their places, and the tensors that they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fxprune.artifacts.recipe import ORIGIN
from fxprune.errors import OptionError
from fxprune.graph.call import flat_tensors, positional
from fxprune.graph.examples import example_for
from fxprune.sources.networks import load_model, onnx_inputs

__all__ = ["inputs_of", "positional_network"]


def positional_network(spec: str) -> nn.Module:
    """The network that `load_model` finds; one that fxprune wrote takes its tensors by position.

    Raises:
        SourceError: As `load_model`.
        ArtifactError: Likewise.
    """
    network = load_model(spec)
    origin = getattr(network, "meta", {}).get(ORIGIN)
    return network if origin is None else positional(network, example_for(network, origin.plan.inputs))


def inputs_of(
    specs: Sequence[str], *, batch: int | None = None, shapes: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, ...]:
    """Inputs for all of some networks: always the same noise.

    Args:
        specs: What `load_model` takes. ONNX files say what they take, and folders that fxprune wrote.
        batch: Size of dimension 0; by default what they say, or 1.
        shapes: One shape for each input, needed where nothing says it, or not all of it.

    Raises:
        OptionError: They take different inputs; or `shapes` does not match, or is needed and not given.
        SourceError: As `load_model`.
        ArtifactError: Likewise.
    """
    known = {spec: inputs for spec in specs if (inputs := _known(spec, batch, shapes)) is not None}
    if not known:
        if not shapes:
            raise OptionError(f"{specs[0]} does not say what it takes: give --input-shape.")
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(list(shape), generator=generator) for shape in shapes)
    (first, inputs), *others = known.items()
    for other, theirs in others:
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in theirs]:
            raise OptionError(f"{first} and {other} take different inputs: they cannot be compared.")
    return inputs


def _known(spec: str, batch: int | None, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...] | None:
    """Inputs of one network, None where nothing says what they are."""
    if Path(spec).suffix == ".onnx":
        return onnx_inputs(spec, batch=batch, shapes=shapes)
    if shapes or not Path(spec).is_dir():
        return None
    network = load_model(spec)
    origin = getattr(network, "meta", {}).get(ORIGIN)
    if origin is None:
        return None
    example = example_for(network, origin.plan.inputs)
    return flat_tensors(example.select(torch.arange(batch or 1) % example.batch_size))
