"""Scaled dot-product attention over other than four dimensions, in the four that torch's ONNX exporter knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FourDimensionalAttention"]


class FourDimensionalAttention(TorchFunctionMode):
    """While it is on, attention with batch dimensions `[...]` runs as `[batch, heads, tokens, width]`.

    Nested and hierarchical transformers attend over `[batch, heads, windows, tokens, width]`, and some networks over
    `[batch, tokens, width]`. The result is the same up to rounding. Calls that cannot be arranged so are left as
    they are.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Rearranges attention; everything else runs as it is."""
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    batch = query.shape[:-2]
    alike = key.shape[:-2] == batch and value.shape[:-2] == batch
    if query.dim() in (2, 4) or not alike:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **options)

    def arranged(x: Tensor) -> Tensor:
        return x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)

    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = arranged(attn_mask.expand(*batch, *attn_mask.shape[-2:]))
    result = F.scaled_dot_product_attention(
        arranged(query), arranged(key), arranged(value), attn_mask, *rest, **options
    )
    return result.reshape(*batch, *result.shape[-2:])
