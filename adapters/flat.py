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


def cut_a(layout: RowLayout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each module's A [R, H_in], views of the flat numbers [R·ΣH_in]."""
    pieces = torch.split(flat, [layout.rank * m.h_in for m in layout.modules])
    return {m.name: piece.view(layout.rank, m.h_in) for m, piece in zip(layout.modules, pieces, strict=True)}


def cut_b(layout: RowLayout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each module's B [H_out, R], views of the flat numbers [R·ΣH_out]."""
    pieces = torch.split(flat, [layout.rank * m.h_out for m in layout.modules])
    return {m.name: piece.view(m.h_out, layout.rank) for m, piece in zip(layout.modules, pieces, strict=True)}


def lora_of(layout: RowLayout, a: torch.Tensor, b: torch.Tensor) -> LoraWeights:
    """The LoRA that these flat numbers hold; its tensors are views of them."""
    return LoraWeights(layout.rank, cut_a(layout, a), cut_b(layout, b))
