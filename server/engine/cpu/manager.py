"""Slots as the CPU kernels read them, and fusions as they make them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig

from adapters.flat import FlatLora
from server.engine.cpu.native import kernels
from server.engine.cpu.operators import SlotTable, check_in_use
from server.engine.fusing.manager import FusingLoRAManager
from server.engine.fusing.slots import FusedSlots, Tenant
from server.settings import Settings


class CpuSlots(FusedSlots):
    """Every layer's B lies transposed in memory, [S, 1, R, H_out], behind tensors of the shape that vLLM knows.

    Along H_out the kernel reads and writes contiguous memory, whatever the rank.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = SlotTable(self.lora_slots)
        check_in_use(self.punica_wrapper_mapping.values())
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper.watch(self._table)
        for module in self.modules.values():
            lay_b_across(module)

    def _put(self, index: int, tenant: Tenant) -> None:
        super()._put(index, tenant)
        self._table.note(index, tenant.rank, tenant.same_a)


def lay_b_across(layer: Any) -> None:
    """Transpose a layer's B in memory; its slots must be empty."""
    stacks = layer.lora_b_stacked
    if isinstance(stacks, tuple):
        layer.lora_b_stacked = tuple(_zeros_across(stack) if stack.dim() == 4 else stack for stack in stacks)


def _zeros_across(like: torch.Tensor) -> torch.Tensor:
    slots, one, h_out, rank = like.shape
    return like.new_zeros(slots, one, rank, h_out).transpose(2, 3)


class CpuLoRAManager(FusingLoRAManager):
    """Sums with the compiled kernel, if there is one, and lays B out as it lies in the slots."""

    _manager_cls = CpuSlots

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        compiled = kernels(Settings().cache_dir)
        self._sum_across = compiled.weighted_sum_across.default if compiled else None
        return super().create_lora_manager(model, vllm_config)

    def _lay_out(self, flat: FlatLora) -> FlatLora:
        return flat.across()
