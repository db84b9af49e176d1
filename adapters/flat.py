"""Convert between a LoRA's per-module matrices and the flat numbers of a row (layout in `adapters/lora.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters.lora import LoraWeights, ModuleShape, RowLayout


@dataclass(frozen=True, slots=True)
class FlatLora:
    """A LoRA held in a few tensors instead of two per module, so that few calls create and copy it."""

    modules: tuple[ModuleShape, ...]
    a: tuple[torch.Tensor, ...]  # flat blocks [Rᵢ·ΣH_in]; a module's A stacks its part of every block
    b: torch.Tensor  # B of all modules, stacked: [ΣH_out, R], where R is the sum of the blocks' ranks

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

    def transposed(self) -> FlatLora:
        """Return a copy whose B has the same shape but is contiguous along H_out, as [R, ΣH_out] in memory."""
        if self.b.t().is_contiguous():
            return self
        return FlatLora(self.modules, self.a, torch.stack(self.b.unbind(1)).t())

    def weights(self) -> LoraWeights:
        """Return A and B per module; A is a view if it is a single block."""
        cuts = [cut_a(RowLayout(self.modules, r, shared_a=False), a) for r, a in zip(self.ranks, self.a, strict=True)]
        a = cuts[0] if len(cuts) == 1 else {m.name: torch.cat([cut[m.name] for cut in cuts]) for m in self.modules}
        pieces = torch.split(self.b, [m.h_out for m in self.modules])
        return LoraWeights(self.rank, a, {m.name: b for m, b in zip(self.modules, pieces, strict=True)})


def flattened(layout: RowLayout, matrices: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return A or B of all modules in layout order, [R·ΣH_in] or [R·ΣH_out] float32."""
    return torch.cat([matrices[m.name].float().reshape(-1) for m in layout.modules])


def cut_a(layout: RowLayout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return A [R, H_in] per module, as views of the flat numbers [R·ΣH_in]."""
    return {m.name: flat[cut].view(layout.rank, m.h_in) for m, cut, _ in layout.slices()}


def cut_b(layout: RowLayout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return B [H_out, R] per module, as views of the flat numbers [R·ΣH_out]."""
    return {m.name: flat[cut].view(m.h_out, layout.rank) for m, _, cut in layout.slices()}


def lora_of(layout: RowLayout, a: torch.Tensor, b: torch.Tensor) -> LoraWeights:
    """Return the LoRA stored in flat A and B; its tensors are views."""
    return LoraWeights(layout.rank, cut_a(layout, a), cut_b(layout, b))
