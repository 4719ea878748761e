"""What may name a network, and how large an input may be; imports nothing, so that `--help` answers at once."""

from __future__ import annotations

__all__ = ["FORMS", "MOST_VALUES"]

FORMS = (
    "torchvision:NAME, timm:NAME, path/to/file.py:factory, a .pt2 or .onnx file, or a folder with model.pt2"
)
"""What names a network."""
MOST_VALUES = 2**28
"""Values in one input: a GiB of float32."""
