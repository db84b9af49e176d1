"""Slots that fused adapters are written into: vLLM's own, with a short cut from one recipe of a bank to the next.

vLLM fills a slot module by module: zero both matrices, then copy both. A slot whose last tenant was of the same bank
and rank needs no zeroing, for the same cells are written again; in a `shared` bank it holds the one A already, so that
only B is copied, in one call for all modules. Every first tenant takes vLLM's way, and so does whatever vLLM cuts into
slices first (tensor parallelism, mixtures of experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager

Tenancy = tuple[str, int]
"""Bank and fused rank: adapters that agree in both fill the same cells of a slot."""


class FusedLoRAModel(LoRAModel):  # type: ignore[misc]
    """vLLM's in-memory adapter, with what it was fused from.

    Attributes:
        recipe: its name.
        tenancy: see `Tenancy`.
        shares_a: whether all adapters of the bank have one A.
    """

    recipe: str
    tenancy: Tenancy
    shares_a: bool


class FusedSlots(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's two tiers, CPU and slots, that know whose cells each slot holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tenants: list[Tenancy | None] = [None] * self.lora_slots
        self._cells: dict[tuple[int, Tenancy], list[torch.Tensor]] = {}
        self._plain: dict[Tenancy, bool] = {}

    def activate_adapter(self, lora_id: int) -> bool:
        """Have an adapter in a slot and make it the most recent there; whether it had to be written."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        index = self.lora_index_to_id.index(None)
        model = self._registered_adapters[lora_id]
        tenancy = model.tenancy if isinstance(model, FusedLoRAModel) else None
        if tenancy is not None and self._tenants[index] == tenancy:
            self._active_adapters[lora_id] = None
            self.lora_index_to_id[index] = lora_id
            self._overwrite(index, model)
        else:
            super().activate_adapter(lora_id)  # takes the same slot: the first free one
            self._tenants[index] = tenancy if tenancy is not None and self._is_plain(model) else None
        return True

    def _overwrite(self, index: int, model: FusedLoRAModel) -> None:
        """Copy an adapter over one of the same tenancy."""
        key = (index, model.tenancy)
        if key not in self._cells:
            self._cells[key] = [
                stack[index, 0, : matrix.shape[0], : matrix.shape[1]] for stack, matrix in self._writes(model)
            ]
        torch._foreach_copy_(self._cells[key], [matrix for _, matrix in self._writes(model)], non_blocking=True)

    def _writes(self, model: FusedLoRAModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What differs between adapters of one tenancy, each with vLLM's tensor over all slots it goes to."""
        for name, module in self.modules.items():
            layer = model.loras.get(name)
            if layer is None:
                continue
            yield from _pairs(module.lora_b_stacked, layer.lora_b)
            if not model.shares_a:
                yield from _pairs(module.lora_a_stacked, layer.lora_a)

    def _is_plain(self, model: FusedLoRAModel) -> bool:
        """Whether vLLM copies every matrix of such an adapter whole, into tensors [slots, 1, rows, columns]."""
        if model.tenancy not in self._plain:
            self._plain[model.tenancy] = self._looks_plain(model)
        return self._plain[model.tenancy]

    def _looks_plain(self, model: FusedLoRAModel) -> bool:
        return all(
            module.tp_size == 1 and len(_listed(model.loras[name].lora_b)) == len(module.lora_b_stacked)
            for name, module in self.modules.items()
            if name in model.loras
        ) and all(stack.dim() == 4 and stack.shape[1] == 1 for stack, _ in self._writes(model))


def _listed(matrices: torch.Tensor | list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """One module's A or B as a list: vLLM packs several modules (q, k and v) into one."""
    return [matrices] if isinstance(matrices, torch.Tensor) else matrices


def _pairs(
    stacks: tuple[torch.Tensor, ...], matrices: torch.Tensor | list[torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for stack, matrix in zip(stacks, _listed(matrices), strict=True):
        if matrix is not None:
            yield stack, matrix
