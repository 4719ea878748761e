"""The ways in which torch runs a network that is timed: as it is, or as its users make it faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxprune.errors import MeasurementError
from fxprune.tracing.evaluation import evaluation_copy

__all__ = ["Ready", "module_call"]


class Ready(NamedTuple):
    """A network that can be called without arguments.

    Attributes:
        call: Runs it; a card may still be at it when torch returns, and at nothing else.
        conditions: What its runtime was told.
    """

    call: Callable[[], object]
    conditions: dict[str, object]


def module_call(module: nn.Module, inputs: Sequence[Tensor], backend: str, place: torch.device) -> Ready:
    """A module on a device, in evaluation mode; it is copied where it would have to be changed.

    Raises:
        MeasurementError: The backend is nothing for it; or compiling it failed.
    """
    way = backend.partition("-")[2]
    tensors = [*module.parameters(), *module.buffers()]
    ready = all(x.device == place for x in tensors) and not any(m.training for m in module.modules())
    keep = ready and way in ("", "compile")
    network = module if keep else evaluation_copy(module).requires_grad_(False).to(place)
    given = [x.to(place) for x in inputs]
    if way == "channels-last":
        if not any(x.dim() == 4 for x in given):
            raise MeasurementError(f"{backend} orders images otherwise, and no input has four dimensions")
        network = network.to(memory_format=torch.channels_last)
        given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]
    elif way == "bf16":
        network = network.to(torch.bfloat16)
        given = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in given]
    called = _compiled(network, given) if way == "compile" else network
    return Ready(partial(called, *given), _conditions(network, given, way, place))


def _compiled(network: nn.Module, given: Sequence[Tensor]) -> Callable[..., object]:
    compiled = torch.compile(network)
    try:
        # past its limit for one function's code torch would go on uncompiled, in silence
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            compiled(*given)
    except Exception as error:  # of dynamo, of inductor, of the compiler, or of the network
        gist = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise MeasurementError(f"torch.compile failed: {gist}") from error
    return compiled


def _conditions(
    network: nn.Module, given: Sequence[Tensor], way: str, place: torch.device
) -> dict[str, object]:
    types = {x.dtype for x in (*network.parameters(), *given) if x.is_floating_point()}
    told: dict[str, object] = {
        "torch": torch.__version__,
        "compiled": way == "compile",
        "dtype": ", ".join(sorted(str(one).removeprefix("torch.") for one in types)),
        "memory_format": "channels_last" if way == "channels-last" else "as it is",
    }
    if place.type == "cuda":
        told |= {
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_matmuls": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    return told
