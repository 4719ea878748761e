"""The network that a caller means: out of torch's wrappers, and nothing that no front end can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fxprune.errors import TraceError

__all__ = ["inner", "unwrapped"]


def inner(module: Any) -> Any:
    """What `torch.compile`, `DataParallel` and `DistributedDataParallel` wrap; anything else is itself."""
    compiled = getattr(module, "_orig_mod", None)  # importing the type of compiled modules would take seconds
    if compiled is not None:
        return inner(compiled)
    return inner(module.module) if isinstance(module, (DataParallel, DistributedDataParallel)) else module


def unwrapped(model: Any) -> Any:
    """The network inside torch's wrappers.

    Raises:
        TraceError: It is TorchScript, not initialised, or the call comes from inside `torch.autocast`.
    """
    network = inner(model)
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise TraceError(
            "this runs inside torch.autocast, whose casts a graph does not hold: leave autocast first"
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise TraceError(
            "the network is TorchScript, which torch.fx cannot read: give the module it was made from"
        )
    if isinstance(network, nn.Module):
        tensors = [*network.named_parameters(), *network.named_buffers()]
        lazy = [name for name, tensor in tensors if is_lazy(tensor)]
        if lazy:
            raise TraceError(
                f"{lazy[0]} has no shape yet, as that of a lazy module: run the network once first"
            )
    return network
