"""The weights of a network as one number: the same where names, types, shapes and values are."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bytes_of", "hash_weights"]


def hash_weights(gm: nn.Module) -> str:
    """SHA-256 (hex) over parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """The raw bytes of a tensor on any device, as a buffer that can be hashed."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
