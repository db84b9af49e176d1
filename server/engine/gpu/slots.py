"""Slots on GPUs: the bank's rows lie on the device, and an adapter is made by writing it into its slot.

Launches (`kernel.py`) follow each other on the stream of the model's steps: the last step that reads the slot's former
adapter ends before, and the step that needs this one begins after. With tensor parallelism a rank keeps and sums only
its slice of each row, cut by vLLM's layers as they cut any adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from adapters.flat import cut_a, cut_b
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe
from bank.errors import BankError
from server.engine.fusing.metrics import timed
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots, Stacks
from server.engine.gpu.kernel import Placement

Matrices = Mapping[str, torch.Tensor]  # A or B by module
Pair = tuple[torch.Tensor, torch.Tensor]
GIB = 1 << 30


class SummedLoRAModel(FusedLoRAModel):
    """An adapter that exists in slots alone: the rows that it sums, and the user's own LoRA."""

    def __init__(self, lora_id: int, recipe: FusionRecipe, matrix: MetaMatrix, own: LoraWeights | None) -> None:
        self.rows, self.weights = zip(*recipe.rows(matrix.common_index if recipe.common else 0), strict=True)
        self.own, shares_a = own, matrix.shared_a is not None
        blocks = (matrix.layout.rank,) * (1 if shares_a else len(self.rows))
        ranks = (*blocks, own.rank) if own else blocks
        super().__init__(lora_id, recipe.name, ranks, bank=recipe.bank, shares_a=shares_a)


@dataclass(frozen=True)
class DeviceBank:
    """A bank as a rank serves it; `a` has one row, the frozen A, if all rows share it."""

    rank: int  # of its rows
    a: torch.Tensor  # [N, R·ΣH_in] bf16 on the device
    b: torch.Tensor  # [N, R·ΣH_out]
    stacks: Stacks  # slots of its modules
    cut: Callable[[LoraWeights], Pair]  # a user's LoRA to this rank's flat A and B, on the host
    _placements: dict[tuple[int, int], tuple[Placement, Placement]] = field(default_factory=dict)

    @cached_property
    def only(self) -> Pair:
        """Return the choice of a source's first row, as it is."""
        device = self.a.device
        return torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, device=device)

    def write(self, index: int, model: SummedLoRAModel, *, has_shared_a: bool) -> None:
        """Write an adapter into a slot, without the frozen A if it has that already."""
        chosen = async_tensor_h2d([*model.rows], self.a.device, torch.int64)
        weights = async_tensor_h2d([*model.weights], self.a.device, torch.float32)
        first = self.rank
        if model.shares_a:
            of_a, of_b = self._placements_of(0, self.rank)
            of_b.write(index, self.b, chosen, weights)
            if not has_shared_a:
                of_a.write(index, self.a, *self.only)
        else:
            for position, (row, weight) in enumerate(zip(chosen.split(1), weights.split(1), strict=True)):
                of_a, of_b = self._placements_of(position * self.rank, self.rank)
                of_a.write(index, self.a, row, self.only[1])
                of_b.write(index, self.b, row, weight)
            first *= len(chosen)
        if model.own:
            for placement, flat in zip(self._placements_of(first, model.own.rank), self.cut(model.own), strict=True):
                placement.write(index, async_tensor_h2d(flat, self.a.device)[None], *self.only)

    def zero(self, index: int, first: int) -> None:
        """Write zeros beyond the first ranks of a slot."""
        if room := self.stacks[0][0].shape[2] - first:
            for placement in self._placements_of(first, room):
                placement.write(index, self.a, self.only[0][:0], self.only[1][:0])

    def _placements_of(self, first: int, rank: int) -> tuple[Placement, Placement]:
        """Return where rows `first` to `first + rank` of each A lie, and these columns of each B."""
        if (first, rank) not in self._placements:
            of_a = [a[:, 0, first : first + rank] for a, _ in self.stacks]
            of_b = [b[:, 0, :, first : first + rank] for _, b in self.stacks]
            self._placements[first, rank] = Placement.of(of_a), Placement.of(of_b)
        return self._placements[first, rank]


class DeviceSlots(FusedSlots):
    def _reset_records(self) -> None:
        super()._reset_records()
        self.banks: dict[str, DeviceBank] = {}  # without those whose adapters vLLM writes

    def open_bank(self, bank: str, matrix: MetaMatrix, vllm_names: Mapping[str, str]) -> None:
        """Copy a bank's rows to the device, unless vLLM must write its adapters; BankError if they do not fit."""
        layout, plain = matrix.layout, not self.lora_config.fully_sharded_loras
        stacks = self.stacks([vllm_names[module.name] for module in layout.modules], sliced=plain)
        if not stacks:
            return

        def cut(own: LoraWeights) -> Pair:
            return self._cut("slice_lora_a", own.a, vllm_names), self._cut("slice_lora_b", own.b, vllm_names)

        rows_of_a = matrix.rows[:, : layout.a_numbers] if matrix.shared_a is None else matrix.shared_a[None]
        rows_of_b = matrix.rows[:, -layout.b_numbers :]
        device, rank = stacks[0][0].device, layout.rank
        h_in, h_out = sum(a.shape[3] for a, _ in stacks), sum(b.shape[2] for _, b in stacks)
        sizes = (len(rows_of_a), rank * h_in), (len(rows_of_b), rank * h_out)
        try:
            a, b = (torch.empty(size, dtype=matrix.rows.dtype, device=device) for size in sizes)
        except torch.OutOfMemoryError as error:
            needed = matrix.rows.element_size() * sum(map(math.prod, sizes))
            raise BankError(
                f"the rows of bank {bank} need {needed / GIB:.1f} GiB on {device}, which has less free beside the base "
                "model and the slots: lower MTA_MAX_LORAS, raise MTA_TENSOR_PARALLEL_SIZE, or build the bank with "
                "fewer directions or a smaller rank"
            ) from error
        for row, whole in zip(a, rows_of_a, strict=True):
            row.copy_(self._cut("slice_lora_a", cut_a(layout, whole), vllm_names))
        for row, whole in zip(b, rows_of_b, strict=True):
            row.copy_(self._cut("slice_lora_b", cut_b(layout, whole), vllm_names))
        self.banks[bank] = DeviceBank(rank, a, b, stacks, cut)

    def _cut(self, how: str, matrices: Matrices, vllm_names: Mapping[str, str]) -> torch.Tensor:
        """Return A or B of all modules as this rank holds them, flat; `how` is the name of a layer's method."""
        tensors: dict[str, torch.Tensor] = {vllm_names[name]: matrix for name, matrix in matrices.items()}
        for name, layer in self.modules.items():
            parts = self.packed_modules.get(name, [name])
            if layer.tp_size > 1 and not tensors.keys().isdisjoint(parts):
                given = [tensors.get(part) for part in parts]
                cut = getattr(layer, how)(given) if len(parts) > 1 else [getattr(layer, how)(given[0])]
                tensors |= {part: each for part, each in zip(parts, cut, strict=True) if each is not None}
        return torch.cat([tensors[vllm_names[name]].reshape(-1) for name in matrices])

    def _writes(self, model: FusedLoRAModel) -> bool:
        return isinstance(model, SummedLoRAModel)

    def _write_cells(self, index: int, model: SummedLoRAModel, *, has_shared_a: bool, padding_is_zero: bool) -> None:
        bank = self.banks[model.bank]
        with timed(self.metrics.fuse):  # until it is launched
            bank.write(index, model, has_shared_a=has_shared_a)
        if not padding_is_zero:
            bank.zero(index, model.rank)
