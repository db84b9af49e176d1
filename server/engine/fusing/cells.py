"""Where in a slot's tensors an adapter's numbers lie, so that another adapter is written over it in one call.

Copying is bound by the number of pieces and of rows, not by bytes: so a row of a few bf16 numbers is copied as one or
two wide ones.
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
    """A part of an adapter and the cells that it fills, piece after piece.

    Attributes:
        block: the block of A it is; None for B.
        across: whether B lies along H_out in memory, and is taken as [R, H_out].
        cells: views of the slot's tensors.
        sizes: of each cell, rows of the adapter's tensor; columns where it is taken across.
        dtype: what both sides are taken for.
    """

    block: int | None
    across: bool
    cells: list[torch.Tensor]
    sizes: list[int]
    dtype: torch.dtype

    @classmethod
    def of_b(cls, cells: Sequence[torch.Tensor]) -> list[Run]:
        """All modules' B for each slot, from their cells over all slots [S, H_out, R]."""
        if lies_across(cells[0]):
            return cls._by_slot(None, True, [cell.transpose(1, 2) for cell in cells], [cell.shape[1] for cell in cells])
        wide = _widened(cells)
        return cls._by_slot(None, False, wide, [cell.shape[1] for cell in wide])

    @classmethod
    def of_a(cls, block: int, cells: Sequence[torch.Tensor]) -> list[Run]:
        """All modules' parts of a block of A for each slot, from their cells over all slots [S, Rᵢ·H_in]."""
        wide = _widened(cells)
        return cls._by_slot(block, False, wide, [cell.shape[1] for cell in wide])

    @classmethod
    def _by_slot(cls, block: int | None, across: bool, cells: Sequence[torch.Tensor], sizes: list[int]) -> list[Run]:
        return [cls(block, across, of_slot, sizes, cells[0].dtype) for of_slot in _apart(cells)]

    def pieces(self, flat: FlatLora) -> tuple[torch.Tensor, ...]:
        """The same part of another adapter of the tenancy, in the pieces that the cells take."""
        if self.across:
            return torch.split(flat.b.t(), self.sizes, dim=1)
        whole = flat.b.contiguous() if self.block is None else flat.a[self.block]
        return torch.split(whole.view(self.dtype), self.sizes)


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of the modules of a bank in one slot, as adapters of one tenancy fill them.

    Attributes:
        runs: what an adapter fills, B first.
        same: where among `runs` the block of A is that all adapters share; None without one.
        rest: what none of them fills.
    """

    runs: tuple[Run, ...]
    same: int | None
    rest: list[torch.Tensor]

    @classmethod
    def of_slots(
        cls, stacks: Sequence[tuple[torch.Tensor, torch.Tensor]], ranks: Sequence[int], shares_a: bool
    ) -> list[Cells]:
        """The cells of each slot; made for all of them at once, that takes a tenth of the time.

        Args:
            stacks: for each module, in the adapter's order, A [S, 1, rows, H_in] and B [S, 1, H_out, columns].
            ranks: of each block of A.
            shares_a: whether the first block is the same in all adapters.
        """
        rank, start, slots = sum(ranks), 0, len(stacks[0][0])
        runs = [Run.of_b([b[:, 0, :, :rank] for _, b in stacks])]
        for block, rows in enumerate(ranks):
            runs.append(Run.of_a(block, [a[:, 0, start : start + rows].view(slots, -1) for a, _ in stacks]))
            start += rows
        rest = [part for a, b in stacks for part in (a[:, 0, rank:], b[:, 0, :, rank:]) if part[0].numel()]
        rests: list[list[torch.Tensor]] = _apart(rest) if rest else [[] for _ in range(slots)]
        same = 1 if shares_a else None
        return [cls(of_slot, same, rest) for of_slot, rest in zip(zip(*runs, strict=True), rests, strict=True)]

    def write(self, flat: FlatLora, *, a_is_there: bool = False, rest_is_clear: bool = False) -> None:
        """Write an adapter.

        Args:
            flat: its numbers.
            a_is_there: whether the slot has the shared block of A already.
            rest_is_clear: whether what the adapter does not fill is zero already.
        """
        runs = [run for place, run in enumerate(self.runs) if not (a_is_there and place == self.same)]
        pieces = [piece for run in runs for piece in run.pieces(flat)]
        torch._foreach_copy_([cell for run in runs for cell in run.cells], pieces, non_blocking=True)
        if self.rest and not rest_is_clear:
            torch._foreach_zero_(self.rest)


def lies_across(b: torch.Tensor) -> bool:
    """Whether a B [..., H_out, R] lies along H_out in memory."""
    return b.stride(-2) == 1 and b.stride(-1) > 1


def _apart(cells: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """For each slot its part of cells over all slots [S, …]."""
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
