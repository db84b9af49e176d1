"""Slots on CPUs: adapters were summed before, and one call copies all modules into a slot (`Cells`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.flat import FlatLora
from server.engine.cpu.lora import SlotTable
from server.engine.fusing.slots import FlatLoRAModel, Footprint, FusedLoRAModel, FusedSlots, SlotContent, Stacks


class CpuSlots(FusedSlots):
    """Slots whose B is contiguous along H_out, as the kernel needs, with unchanged tensor shapes for vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._describe_slots()
        for module in self.modules.values():
            transpose_b(module)

    def _record(self, index: int, content: SlotContent) -> None:
        super()._record(index, content)
        self._describe_slots()

    def _reset_records(self) -> None:
        super()._reset_records()
        self._cells: dict[Footprint, list[Cells]] = {}
        self._stacks: dict[str, Stacks] = {}

    def _describe_slots(self) -> None:
        table = SlotTable(self._contents)
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper.table = table

    def prepare(self, model: FlatLoRAModel) -> None:
        """Compute the cells of adapters like this one ahead of a step, in any thread; it takes about 0.1 s."""
        if self._writes(model):
            self._cells_of(model)

    def _writes(self, model: FusedLoRAModel) -> bool:
        return isinstance(model, FlatLoRAModel) and bool(self._stacks_of(model))

    def _write_cells(self, index: int, model: FlatLoRAModel, *, has_shared_a: bool, padding_is_zero: bool) -> None:
        self._cells_of(model)[index].write(model.flat, has_shared_a=has_shared_a, padding_is_zero=padding_is_zero)

    def _cells_of(self, model: FlatLoRAModel) -> list[Cells]:
        if model.footprint not in self._cells:
            self._cells[model.footprint] = Cells.of_slots(self._stacks_of(model), model.flat.ranks)
        return self._cells[model.footprint]

    def _stacks_of(self, model: FlatLoRAModel) -> Stacks:
        if model.bank not in self._stacks:
            names = [model.vllm_names[module.name] for module in model.flat.modules]
            self._stacks[model.bank] = self.stacks(names)
        return self._stacks[model.bank]


def transpose_b(layer: Any) -> None:
    """Make a layer's B contiguous along H_out; the slots must be empty."""
    stacks = layer.lora_b_stacked
    if isinstance(stacks, tuple):
        layer.lora_b_stacked = tuple(
            stack.new_zeros(stack.transpose(2, 3).shape).transpose(2, 3) if stack.dim() == 4 else stack
            for stack in stacks
        )


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of a bank's modules in one slot. The cost of copying depends on their number, not on bytes."""

    parts: list[list[torch.Tensor]]  # B of each module [R, H_out], then each block of A of each module [Rᵢ·H_in]
    sizes: list[list[int]]  # the last dimension of each, the same for all slots: to ask the cells takes 0.1 ms
    padding: list[torch.Tensor]  # cells beyond the adapter's rank, which must be zero

    @classmethod
    def of_slots(cls, stacks: Stacks, ranks: Sequence[int]) -> list[Cells]:
        """Return the cells of all slots; creating them together takes a tenth of the time.

        `stacks` has each module's A [S, 1, rows, H_in] and B [S, 1, H_out, columns], in the adapter's module order.
        `ranks` are the ranks of the blocks of A.
        """
        rank, start, slots = sum(ranks), 0, len(stacks[0][0])
        parts = [_per_slot([b[:, 0, :, :rank].mT for _, b in stacks])]  # so CPUs have it in memory
        for rows in ranks:
            parts.append(_per_slot([a[:, 0, start : start + rows].view(slots, -1) for a, _ in stacks]))
            start += rows
        padding = [part for a, b in stacks for part in (a[:, 0, rank:], b[:, 0, :, rank:]) if part[0].numel()]
        paddings = _per_slot(padding) if padding else [[] for _ in range(slots)]
        sizes = [[cell.shape[-1] for cell in of_slots[0]] for of_slots in parts]
        return [cls([*of_slot], sizes, rest) for of_slot, rest in zip(zip(*parts, strict=True), paddings, strict=True)]

    def write(self, flat: FlatLora, *, has_shared_a: bool = False, padding_is_zero: bool = False) -> None:
        """Write an adapter; skip the first block of A or the padding if the slot already has the right values."""
        given = list(zip(self.parts, self.sizes, (flat.b.mT, *flat.a), strict=True))
        if has_shared_a:
            del given[1]
        pieces = [piece for _, sizes, whole in given for piece in torch.split(whole, sizes, dim=-1)]
        torch._foreach_copy_([cell for cells, _, _ in given for cell in cells], pieces, non_blocking=True)
        if self.padding and not padding_is_zero:
            torch._foreach_zero_(self.padding)


def _per_slot(cells: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [list(of_slot) for of_slot in zip(*(cell.unbind(0) for cell in cells), strict=True)]
