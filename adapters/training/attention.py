"""Attention for training on CPUs, with forward and backward written out.

The usual plain attention repeats keys and values for each head that shares them, takes softmax in float32 and keeps
every step of it. PyTorch's fused one is quick forward and slow backward on CPUs.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

_NAME = "mta_training"


def use_quick_attention(model: Any) -> None:
    """Have a Hugging Face model use the attention of this module, if it means the same by attention.

    It does where its own code for plain attention is Llama's, word for word.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.llama import modeling_llama

    own = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    if own is None or inspect.getsource(own) != inspect.getsource(modeling_llama.eager_attention_forward):
        return
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's interface; there is no dropout in evaluation mode."""
    attended: torch.Tensor = _Attention.apply(query, key, value, attention_mask, scaling)
    return attended, None


class _Attention(torch.autograd.Function):
    """[B, H, T, D], [B, K, S, D] twice and a mask to add, [B, 1, T, S] → [B, T, H, D]; H/K heads share keys and values."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        batch, heads, length, size = query.shape
        asked = (query * scaling).reshape(batch, key.shape[1], -1, size)
        seen = asked @ key.transpose(2, 3)
        if mask is not None:
            seen.view(batch, heads, length, -1).add_(mask)
        seen = seen.softmax(-1)
        ctx.save_for_backward(asked, key, value, seen)
        ctx.scaling = scaling
        return (seen @ value).view(batch, heads, length, -1).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        asked, key, value, seen = ctx.saved_tensors
        batch, length, heads, size = grads[0].shape
        grad = grads[0].transpose(1, 2).reshape(batch, key.shape[1], -1, size)
        of_value = seen.transpose(2, 3) @ grad
        of_seen = torch._softmax_backward_data(grad @ value.transpose(2, 3), seen, -1, seen.dtype)
        of_query = (of_seen @ key).mul_(ctx.scaling).view(batch, heads, length, -1)
        return of_query, of_seen.transpose(2, 3) @ asked, of_value, None, None
