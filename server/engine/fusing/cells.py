"""Where in a slot's tensors an adapter's numbers lie, so that another adapter is written over it in one call.

Copying is bound by the number of pieces and of rows, not by bytes: so cells that follow each other in memory are taken
as one, and a row of a few bf16 numbers is copied as one or two wide ones.
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
    def of_b(cls, cells: Sequence[torch.Tensor]) -> Run:
        """All modules' B."""
        if lies_across(cells[0]):
            return cls(None, True, [cell.t() for cell in cells], [len(cell) for cell in cells], cells[0].dtype)
        return cls._joined(None, cells)

    @classmethod
    def of_a(cls, block: int, cells: Sequence[torch.Tensor]) -> Run:
        """All modules' parts of a block of A, each flat."""
        return cls._joined(block, cells)

    @classmethod
    def _joined(cls, block: int | None, cells: Sequence[torch.Tensor]) -> Run:
        """Join the cells of neighbours and widen their numbers, where the device is a CPU."""
        joined = _neighbours(cells)
        dtype = _widest(joined) if joined[0].device.type == "cpu" else joined[0].dtype
        wide = [cell.view(dtype) for cell in joined]
        return cls(block, False, wide, [len(cell) for cell in wide], dtype)

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
    rest: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls, index: int, stacks: Sequence[tuple[torch.Tensor, torch.Tensor]], ranks: Sequence[int], shares_a: bool
    ) -> Cells:
        """The cells of a slot.

        Args:
            index: of the slot.
            stacks: for each module, in the adapter's order, A [slots, 1, rows, H_in] and B [slots, 1, H_out, columns].
            ranks: of each block of A.
            shares_a: whether the first block is the same in all adapters.
        """
        rank, start = sum(ranks), 0
        runs = [Run.of_b([b[index, 0, :, :rank] for _, b in stacks])]
        for block, rows in enumerate(ranks):
            runs.append(Run.of_a(block, [a[index, 0, start : start + rows].view(-1) for a, _ in stacks]))
            start += rows
        rest = [part for a, b in stacks for part in (a[index, 0, rank:], b[index, 0, :, rank:]) if part.numel()]
        return cls(tuple(runs), 1 if shares_a else None, tuple(rest))

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


def _neighbours(cells: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same cells, neighbours as one: rows at one distance from each other, in the same storage."""
    joined = [cells[0]]
    for cell in cells[1:]:
        last = joined[-1]
        if (
            cell.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and (cell.stride(), cell.shape[1:]) == (last.stride(), last.shape[1:])
            and cell.storage_offset() == last.storage_offset() + len(last) * last.stride(0)
        ):
            joined[-1] = last.as_strided((len(last) + len(cell), *last.shape[1:]), last.stride())
        else:
            joined.append(cell)
    return joined


def _widest(cells: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest type that divides rows, distances and offsets of all cells, and so the adapter's rows too."""
    for dtype in WIDE:
        times, rest = divmod(dtype.itemsize, cells[0].element_size())
        numbers = [n for cell in cells for n in (cell.shape[-1], cell.storage_offset(), *cell.stride()[:-1])]
        if times and not rest and not any(n % times for n in numbers):
            return dtype
    return cells[0].dtype
