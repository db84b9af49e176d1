"""Attention for training on CPUs, with explicit forward and backward passes that compute only visible positions.

Plain attention computes all pairs of positions, repeats keys and values for each head that shares them, and stores its
softmax in float32. PyTorch's fused attention has a fast forward pass but a slow backward pass on CPUs. This
backward pass computes each block's softmax again, so memory grows with a row's length and not with its square.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

_NAME = "mta_training"


@dataclass(frozen=True, slots=True)
class Block:
    """Positions `first` to `last` of a row, which attend only to the keys of two ranges; ends exclusive."""

    first: int
    last: int
    far: tuple[int, int]
    near: tuple[int, int]

    def seen(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the visible part of a tensor that has the keys along `dim`."""
        near, far = (tensor.narrow(dim, start, end - start) for start, end in (self.near, self.far))
        return torch.cat([far, near], dim) if self.far[1] > self.far[0] else near

    def add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add `part`, which covers the visible keys, to `total` [B, K, S, D]."""
        (start, end), size = self.far, self.far[1] - self.far[0]
        total[:, :, start:end] += part[:, :, :size]
        total[:, :, slice(*self.near)] += part[:, :, size:]


_blocks: ContextVar[list[Block] | None] = ContextVar("blocks", default=None)


@contextmanager
def in_blocks(blocks: list[Block]) -> Iterator[None]:
    token = _blocks.set(blocks)
    try:
        yield
    finally:
        _blocks.reset(token)


def use_quick_attention(model: Any) -> None:
    """Make a Hugging Face model use this attention if the source of its plain attention equals Llama's."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask
    from transformers.models.llama import modeling_llama

    own = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    if own is None or inspect.getsource(own) != inspect.getsource(modeling_llama.eager_attention_forward):
        return
    AttentionInterface.register(_NAME, _attend)
    # A causal mask is none: of T tokens it would have T² numbers.
    AttentionMaskInterface.register(_NAME, lambda **how: None if sdpa_mask(**how) is None else eager_mask(**how))
    model.set_attn_implementation(_NAME)


def _attend(  # noqa: PLR0917  Hugging Face's interface
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Implement Hugging Face's attention interface; evaluation mode has no dropout."""
    blocks = _blocks.get() or [Block(0, query.shape[2], (0, 0), (0, key.shape[2]))]
    return _Attention.apply(query, key, value, attention_mask, scaling, blocks), None  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Query [B, H, T, D], key and value [B, K, S, D] → [B, T, H, D]; H/K heads per key.

    The mask [B, 1, T, S] is additive; without one, the T queries are the last of S positions, which see no later ones.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        blocks: list[Block],
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        attended = query.new_empty(batch, length, heads, value.shape[-1])
        query = query * scaling
        for block in blocks:
            ids = slice(block.first, block.last)
            _, seen = _softmax(query, key, mask, block)
            part = seen @ block.seen(value, 2)
            attended[:, ids] = part.view(batch, heads, block.last - block.first, -1).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling, ctx.blocks = scaling, blocks
        return attended

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        batch, heads, *_ = query.shape
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            ids = slice(block.first, block.last)
            asked, seen = _softmax(query, key, mask, block)
            grad = grads[0][:, ids].transpose(1, 2).reshape(batch, key.shape[1], -1, value.shape[-1])
            block.add(of_value, seen.transpose(2, 3) @ grad)
            of_seen = grad @ block.seen(value, 2).transpose(2, 3)
            of_seen = torch._softmax_backward_data(of_seen, seen, -1, seen.dtype)
            block.add(of_key, of_seen.transpose(2, 3) @ asked)
            of_query[:, :, ids] = (of_seen @ block.seen(key, 2)).view(batch, heads, block.last - block.first, -1)
        return of_query.mul_(ctx.scaling), of_key, of_value, None, None, None


def _softmax(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, block: Block
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a block's queries [B, K, H/K·T, D] and their softmax over the visible positions."""
    (batch, heads, length, size), positions = query.shape, key.shape[2]
    asked = query[:, :, block.first : block.last].reshape(batch, key.shape[1], -1, size)
    seen = asked @ block.seen(key, 2).transpose(2, 3)
    by_head = seen.view(batch, heads, block.last - block.first, -1)
    if mask is None:
        own = torch.arange(block.first, block.last)[:, None] + positions - length
        by_head.masked_fill_(block.seen(torch.arange(positions), 0) > own, torch.finfo(seen.dtype).min)
    else:
        by_head.add_(block.seen(mask[:, :, block.first : block.last], 3))
    return asked, seen.softmax(-1)
