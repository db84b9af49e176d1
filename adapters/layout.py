"""How one row of the meta-LoRA matrix is cut into per-module A and B. Plain Python: the gateway reads it too.

A row is `[A₀ … A_L | B₀ … B_L]`, each matrix flattened row by row, modules in the order of the layout. In a
`shared` bank all rows have one frozen A, kept once beside the matrix, and a row is `[B₀ … B_L]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapters.lora import ModuleShape

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM accepts for `--max-lora-rank`; every adapter slot is sized for the chosen one."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How a row is cut: modules in their order in it, R of every meta-LoRA, whether A is kept once for all rows."""

    modules: tuple[ModuleShape, ...]
    rank: int
    shared_a: bool

    @property
    def a_numbers(self) -> int:
        """Numbers in all A matrices of one LoRA."""
        return sum(self.rank * m.h_in for m in self.modules)

    @property
    def b_numbers(self) -> int:
        """Numbers in all B matrices of one LoRA."""
        return sum(self.rank * m.h_out for m in self.modules)

    @property
    def row_numbers(self) -> int:
        """D, the numbers in one row of the matrix."""
        return self.b_numbers + (0 if self.shared_a else self.a_numbers)

    def a_slices(self) -> Iterator[tuple[ModuleShape, slice]]:
        """Each module with the slice of its A in the flat `[A₀ … A_L]`."""
        start = 0
        for module in self.modules:
            stop = start + self.rank * module.h_in
            yield module, slice(start, stop)
            start = stop

    def b_slices(self) -> Iterator[tuple[ModuleShape, slice]]:
        """Each module with the slice of its B in the flat `[B₀ … B_L]`."""
        start = 0
        for module in self.modules:
            stop = start + self.rank * module.h_out
            yield module, slice(start, stop)
            start = stop


def serving_rank(rank: int) -> int:
    """The smallest rank vLLM can size its slots for that holds `rank`.

    Raises:
        ValueError: when `rank` is above vLLM's largest.
    """
    for size in VLLM_RANKS:
        if rank <= size:
            return size
    raise ValueError(f"rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}: use fewer anchors or a smaller rank")
