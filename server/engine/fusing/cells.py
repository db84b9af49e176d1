"""Where in a slot's tensors an adapter's numbers lie, so that another adapter is written over it in one call.

The number of pieces and rows costs, not their bytes: so a row of a few bf16 numbers is copied as one or two wide ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapters.flat import FlatLora

WIDE = (torch.complex128, torch.int64, torch.int32)
"""Types of 16, 8 and 4 bytes; as long as nothing is computed, bytes are bytes."""


@dataclass(frozen=True, slots=True)
class Run:
    """A part of an adapter and the cells of one slot that it fills, piece after piece."""

    block: int | None  # of A; None for B
    across: bool  # whether B lies along H_out in memory, and is taken as [R, H_out]
    cells: list[torch.Tensor]  # views of the slot's tensors
    sizes: list[int]  # of each cell, rows of the adapter's tensor; columns where it is taken across
    dtype: torch.dtype  # what both sides are taken for

    @classmethod
    def of_slots(cls, block: int | None, cells: Sequence[torch.Tensor]) -> list[Run]:
        """For each slot, from all modules' cells over all slots: of B [S, H_out, R], of a block of A [S, Rᵢ·H_in]."""
        across = block is None and cells[0].stride(-2) == 1 and cells[0].stride(-1) > 1
        cells = [cell.transpose(1, 2) for cell in cells] if across else _widened(cells)
        sizes = [cell.shape[2 if across else 1] for cell in cells]
        return [cls(block, across, of_slot, sizes, cells[0].dtype) for of_slot in _apart(cells)]

    def pieces(self, flat: FlatLora) -> tuple[torch.Tensor, ...]:
        """The same part of another adapter that fills the same cells, in the pieces that they take."""
        if self.across:
            return torch.split(flat.b.t(), self.sizes, dim=1)
        whole = flat.b.contiguous() if self.block is None else flat.a[self.block]
        return torch.split(whole.view(self.dtype), self.sizes)


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of a bank's modules in one slot."""

    runs: tuple[Run, ...]  # what an adapter fills: B, then the blocks of A
    same: int | None  # which of them is the block of A that all adapters share; None without one
    rest: list[torch.Tensor]  # what none of them fills

    @classmethod
    def of_slots(
        cls, stacks: Sequence[tuple[torch.Tensor, torch.Tensor]], ranks: Sequence[int], shares_a: bool
    ) -> list[Cells]:
        """The cells of each slot, made at once, which takes a tenth of the time.

        `stacks` are each module's A [S, 1, rows, H_in] and B [S, 1, H_out, columns], in the adapter's order, `ranks`
        those of the blocks of A, the first of which all adapters may share.
        """
        rank, start, slots = sum(ranks), 0, len(stacks[0][0])
        runs = [Run.of_slots(None, [b[:, 0, :, :rank] for _, b in stacks])]
        for block, rows in enumerate(ranks):
            runs.append(Run.of_slots(block, [a[:, 0, start : start + rows].view(slots, -1) for a, _ in stacks]))
            start += rows
        rest = [part for a, b in stacks for part in (a[:, 0, rank:], b[:, 0, :, rank:]) if part[0].numel()]
        rests: list[list[torch.Tensor]] = _apart(rest) if rest else [[] for _ in range(slots)]
        same = 1 if shares_a else None
        return [cls(of_slot, same, rest) for of_slot, rest in zip(zip(*runs, strict=True), rests, strict=True)]

    def write(self, flat: FlatLora, *, a_is_there: bool = False, rest_is_clear: bool = False) -> None:
        """Write an adapter, leaving out the shared block of A and the rest's zeros where they are there already."""
        runs = [run for place, run in enumerate(self.runs) if not (a_is_there and place == self.same)]
        pieces = [piece for run in runs for piece in run.pieces(flat)]
        torch._foreach_copy_([cell for run in runs for cell in run.cells], pieces, non_blocking=True)
        if self.rest and not rest_is_clear:
            torch._foreach_zero_(self.rest)


def _apart(cells: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [list(of_slot) for of_slot in zip(*(cell.unbind(0) for cell in cells), strict=True)]


def _widened(cells: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cells over all slots with the widest numbers that divide rows, distances and offsets of all; as is off CPUs."""
    of = cells[0]
    for dtype in WIDE if of.device.type == "cpu" else ():
        times, rest = divmod(dtype.itemsize, of.element_size())
        numbers = [n for cell in cells for n in (cell.shape[-1], cell.storage_offset(), *cell.stride()[:-1])]
        if times and not rest and not any(n % times for n in numbers):
            return [cell.view(dtype) for cell in cells]
    return list(cells)
