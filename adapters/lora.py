"""LoRA weights, the layout of a row of the meta-LoRA matrix, and the letters of all tensor shapes.

    R       rank of a LoRA
    H_in    a module's input width           H_out   its output width
    N       anchors in a bank                K       terms of a recipe
    D       numbers in a meta-LoRA row       E       numbers in an embedding

ΔW [H_out, H_in] = B A with A [R, H_in] and B [H_out, R]; alpha / R is folded into B, so scaling is 1 everywhere. A row
is `[A₀ … A_L | B₀ … B_L]`, each matrix row by row, modules in the layout's order. In a `shared` bank all rows use one
frozen A, stored beside the matrix, and a row is `[B₀ … B_L]`. The gateway imports this module, so torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of `--max-lora-rank`, for which vLLM sizes every slot


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear module that LoRAs adapt; `name` is its path in the Hugging Face model."""

    name: str
    h_in: int
    h_out: int


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """Weights of one LoRA: A [R, H_in] and B [H_out, R] by module name, with scaling folded into B."""

    rank: int
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]

    def delta(self, module: str) -> torch.Tensor:
        return self.b[module].float() @ self.a[module].float()


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Layout of a row: the modules in order, the rank R of every meta-LoRA, and whether all rows share one A."""

    modules: tuple[ModuleShape, ...]
    rank: int
    shared_a: bool

    @property
    def a_numbers(self) -> int:
        return sum(self.rank * m.h_in for m in self.modules)

    @property
    def b_numbers(self) -> int:
        return sum(self.rank * m.h_out for m in self.modules)

    @property
    def row_numbers(self) -> int:
        """Return D, the number of values in one row of the matrix."""
        return self.b_numbers + (0 if self.shared_a else self.a_numbers)

    def slices(self) -> Iterator[tuple[ModuleShape, slice, slice]]:
        """Yield each module with the slices of its A and B in the flat `[A₀ … A_L]` and `[B₀ … B_L]`."""
        a = b = 0
        for module in self.modules:
            a_stop, b_stop = a + self.rank * module.h_in, b + self.rank * module.h_out
            yield module, slice(a, a_stop), slice(b, b_stop)
            a, b = a_stop, b_stop


def serving_rank(rank: int) -> int:
    """Return the smallest slot rank of vLLM that fits `rank`; raise ValueError above the largest slot rank."""
    if rank > VLLM_RANKS[-1]:
        raise ValueError(f"rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}: use fewer anchors or a smaller rank")
    return next(size for size in VLLM_RANKS if rank <= size)
