"""One launch sums rows in float32, rounds the sum once, and stores it into all modules of a slot.

A row holds the modules one after the other; in a slot each module is a tensor of its own, with room for more ranks.
`Placement` says where the numbers of each module lie in both:

    row     │ a b  c d │ e f  g h  i j │    B of two modules, H_out 2 and 3, rank 2
    slot    │ a b · ·  │ e f · ·       │    room for rank 4: width 2, pitch 4
            │ c d · ·  │ g h · ·       │
                       │ i j · ·       │
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import async_tensor_h2d

BLOCK = 1024  # numbers that a program of the kernel sums
MAX_STEP = 8  # adjacent 16-bit numbers that a thread can load at once


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a row's numbers lie in a slot: some rows of the A of each module, or some columns of each B."""

    table: torch.Tensor  # [modules, 6] int64: address in slot 0, pitch of slots, count, start in a row, width, pitch
    largest: int  # count of the largest module
    step: int  # divides counts and starts
    like: torch.Tensor  # of the slots' type

    @classmethod
    def of(cls, views: Sequence[torch.Tensor]) -> Placement:
        """Return the placement of each module's view [S, rows, columns] of its slots, whose columns are adjacent."""
        fields, start = [], 0
        for view in views:
            _, rows, width = view.shape
            fields.append((view.data_ptr(), view.stride(0), rows * width, start, width, view.stride(1)))
            start += rows * width
        table = async_tensor_h2d(fields, views[0].device, torch.int64)
        counts = [count for _, _, count, *_ in fields]
        return cls(table, max(counts), math.gcd(*counts), views[0])

    def write(self, slot: int, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        """Write Σ weightsᵢ rows[chosenᵢ] into a slot, zeros if none is chosen; all tensors are on the slots' device.

        `rows` is [N, D], `chosen` [K] int64, `weights` [K] float32.
        """
        grid = (len(self.table), triton.cdiv(self.largest, BLOCK))
        step = math.gcd(self.step, rows.stride(0), MAX_STEP)
        _write[grid](self.table, slot, rows, rows.stride(0), chosen, weights, len(chosen), self.like, step, BLOCK)


@triton.jit(do_not_specialize=("slot", "row_size", "chosen", "weights", "terms"))  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]  # noqa: PLR0917  Triton reads annotations
    table, slot, rows, row_size, chosen, weights, terms, like, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    fields = table + tl.program_id(0) * 6
    count, start = tl.multiple_of(tl.load(fields + 2), STEP), tl.multiple_of(tl.load(fields + 3), STEP)
    width, pitch = tl.load(fields + 4), tl.load(fields + 5)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for term in range(terms):
        row = rows + tl.multiple_of(tl.load(chosen + term) * row_size, STEP) + start
        total += tl.load(weights + term) * tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(fields).to(tl.pointer_type(like.dtype.element_ty)) + slot * tl.load(fields + 1)
    tl.store(target + at // width * pitch + at % width, total.to(like.dtype.element_ty), mask=inside)
