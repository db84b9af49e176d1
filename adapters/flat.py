"""From a LoRA's per-module matrices to the flat numbers of a row, and back (the cut is `adapters/layout.py`)."""

from __future__ import annotations

import torch

from adapters.layout import RowLayout
from adapters.lora import LoraWeights


def flat_a(layout: RowLayout, lora: LoraWeights) -> torch.Tensor:
    """All A in layout order, [R·ΣH_in] float32."""
    return torch.cat([lora.a[m.name].float().reshape(-1) for m in layout.modules])


def flat_b(layout: RowLayout, lora: LoraWeights) -> torch.Tensor:
    """All B in layout order, [R·ΣH_out] float32."""
    return torch.cat([lora.b[m.name].float().reshape(-1) for m in layout.modules])


def lora_of(layout: RowLayout, a: torch.Tensor, b: torch.Tensor) -> LoraWeights:
    """The LoRA whose flat numbers these are; its tensors are views of them."""
    return LoraWeights(
        rank=layout.rank,
        a={m.name: a[at].view(layout.rank, m.h_in) for m, at in layout.a_slices()},
        b={m.name: b[at].view(m.h_out, layout.rank) for m, at in layout.b_slices()},
    )
