"""From a LoRA's per-module matrices to the flat numbers of a row, and back (the cut is `adapters/lora.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters.lora import LoraWeights, ModuleShape, RowLayout


@dataclass(frozen=True, slots=True)
class FlatLora:
    """A LoRA in a few tensors instead of two for each module, so that few calls make and copy it."""

    modules: tuple[ModuleShape, ...]
    a: tuple[torch.Tensor, ...]  # blocks, each flat [Rᵢ·ΣH_in]; a module's A is its parts of all, one below the other
    b: torch.Tensor  # every module's B, one below the other, [ΣH_out, R]; R is the sum of the blocks' ranks

    @classmethod
    def of(cls, lora: LoraWeights) -> FlatLora:
        modules = tuple(ModuleShape(name, a.shape[1], lora.b[name].shape[0]) for name, a in lora.a.items())
        a = torch.cat([lora.a[m.name].reshape(-1) for m in modules])
        return cls(modules, (a,), torch.cat([lora.b[m.name] for m in modules]))

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        h_in = sum(m.h_in for m in self.modules)
        return tuple(block.numel() // h_in for block in self.a)

    def across(self) -> FlatLora:
        """The same with B along H_out in memory, [R, ΣH_out] behind a tensor of the same shape."""
        if self.b.t().is_contiguous():
            return self
        return FlatLora(self.modules, self.a, torch.stack(self.b.unbind(1)).t())

    def pinned(self) -> FlatLora:
        """The same in page-locked memory, from which GPUs copy fast; nothing is copied that is there already."""
        return FlatLora(self.modules, tuple(block.pin_memory() for block in self.a), self.b.pin_memory())

    def weights(self) -> LoraWeights:
        """Each module's A and B; views where A is a single block."""
        cuts = [cut_a(RowLayout(self.modules, r, shared_a=False), a) for r, a in zip(self.ranks, self.a, strict=True)]
        a = cuts[0] if len(cuts) == 1 else {m.name: torch.cat([cut[m.name] for cut in cuts]) for m in self.modules}
        pieces = torch.split(self.b, [m.h_out for m in self.modules])
        return LoraWeights(self.rank, a, {m.name: b for m, b in zip(self.modules, pieces, strict=True)})


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
