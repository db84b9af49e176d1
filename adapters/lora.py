"""LoRA values, and the letters used for every tensor shape in this project.

    R       rank of a LoRA
    H_in    a module's input width           H_out   its output width
    N       anchors in a bank                K       terms of a recipe
    D       numbers in a meta-LoRA row       E       numbers in an embedding

A LoRA changes a module's weight by ΔW [H_out, H_in] = B A with A [R, H_in] and B [H_out, R]. The usual factor
alpha / R is always folded into B, so inside this package scaling is 1 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear module that LoRAs are attached to, by its path in the Hugging Face model."""

    name: str
    h_in: int
    h_out: int


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The weights of one LoRA, scaling folded into B: module name → A [R, H_in] and B [H_out, R]."""

    rank: int
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]

    def delta(self, module: str) -> torch.Tensor:
        """ΔW [H_out, H_in] of one module, in float32."""
        return self.b[module].float() @ self.a[module].float()
