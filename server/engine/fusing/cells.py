"""Views of the parts of a slot's tensors that adapters fill, so that one call writes a whole adapter.

The cost depends on the number of pieces and rows, not on bytes, so rows are copied as a few wide numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapters.flat import FlatLora

WIDE_DTYPES = (torch.complex128, torch.int64, torch.int32)
"""Types of 16, 8 and 4 bytes, used only to copy raw bytes."""


@dataclass(frozen=True, slots=True)
class Run:
    """One part of an adapter (B or a block of A), and the cells of a slot that it fills."""

    block: int | None  # index of the block of A; None for B
    transposed: bool  # whether B is contiguous along H_out, and copied as [R, H_out]
    cells: list[torch.Tensor]  # views of the slot's tensors
    sizes: list[int]  # rows of the adapter's tensor per cell; columns if transposed
    dtype: torch.dtype  # dtype under which both sides are copied

    @classmethod
    def of_slots(cls, block: int | None, cells: Sequence[torch.Tensor]) -> list[Run]:
        """Return one run per slot; `cells` has each module's B [S, H_out, R] or block of A [S, Rᵢ·H_in]."""
        transposed = block is None and cells[0].stride(-2) == 1 and cells[0].stride(-1) > 1
        cells = [cell.transpose(1, 2) for cell in cells] if transposed else _widen(cells)
        sizes = [cell.shape[2 if transposed else 1] for cell in cells]
        return [cls(block, transposed, of_slot, sizes, cells[0].dtype) for of_slot in _per_slot(cells)]

    def pieces(self, flat: FlatLora) -> tuple[torch.Tensor, ...]:
        """Split this part of an adapter into one piece per cell."""
        if self.transposed:
            return torch.split(flat.b.t(), self.sizes, dim=1)
        whole = flat.b.contiguous() if self.block is None else flat.a[self.block]
        return torch.split(whole.view(self.dtype), self.sizes)


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of a bank's modules in one slot."""

    runs: tuple[Run, ...]  # parts that an adapter fills: B, then the blocks of A
    shared_run: int | None  # index of the run whose block of A all adapters share, if any
    padding: list[torch.Tensor]  # cells beyond the adapter's rank, which must be zero

    @classmethod
    def of_slots(
        cls, stacks: Sequence[tuple[torch.Tensor, torch.Tensor]], ranks: Sequence[int], shares_a: bool
    ) -> list[Cells]:
        """Return the cells of all slots; creating them together takes a tenth of the time.

        `stacks` has each module's A [S, 1, rows, H_in] and B [S, 1, H_out, columns], in the adapter's module order.
        `ranks` are the ranks of the blocks of A; `shares_a` says whether all adapters share the first block.
        """
        rank, start, slots = sum(ranks), 0, len(stacks[0][0])
        runs = [Run.of_slots(None, [b[:, 0, :, :rank] for _, b in stacks])]
        for block, rows in enumerate(ranks):
            runs.append(Run.of_slots(block, [a[:, 0, start : start + rows].view(slots, -1) for a, _ in stacks]))
            start += rows
        padding = [part for a, b in stacks for part in (a[:, 0, rank:], b[:, 0, :, rank:]) if part[0].numel()]
        paddings: list[list[torch.Tensor]] = _per_slot(padding) if padding else [[] for _ in range(slots)]
        shared_run = 1 if shares_a else None
        return [cls(of_slot, shared_run, part) for of_slot, part in zip(zip(*runs, strict=True), paddings, strict=True)]

    def write(self, flat: FlatLora, *, has_shared_a: bool = False, padding_is_zero: bool = False) -> None:
        """Write an adapter; skip the shared block of A or the padding if the slot already has the right values."""
        runs = [run for index, run in enumerate(self.runs) if not (has_shared_a and index == self.shared_run)]
        pieces = [piece for run in runs for piece in run.pieces(flat)]
        torch._foreach_copy_([cell for run in runs for cell in run.cells], pieces, non_blocking=True)
        if self.padding and not padding_is_zero:
            torch._foreach_zero_(self.padding)


def _per_slot(cells: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [list(of_slot) for of_slot in zip(*(cell.unbind(0) for cell in cells), strict=True)]


def _widen(cells: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """View the cells with the widest dtype that divides their rows, strides and offsets; on GPUs return them as is."""
    first = cells[0]
    for dtype in WIDE_DTYPES if first.device.type == "cpu" else ():
        factor, rest = divmod(dtype.itemsize, first.element_size())
        numbers = [n for cell in cells for n in (cell.shape[-1], cell.storage_offset(), *cell.stride()[:-1])]
        if factor and not rest and not any(n % factor for n in numbers):
            return [cell.view(dtype) for cell in cells]
    return list(cells)
