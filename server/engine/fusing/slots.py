"""vLLM's own slots for fused adapters, with a shortcut from one recipe of a bank to the next.

vLLM fills a slot module by module: it packs q, k and v (gate and up) into one, zeroes both matrices, copies both. A
slot whose last tenant was of the same bank and rank needs none of that, because the same cells are written again; in a
`shared` bank it already holds the one A, so that only B is copied, in one call for all modules. The first tenant of a
slot is written by vLLM, and so is whatever vLLM slices first (tensor parallelism, mixtures of experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from adapters.lora import LoraWeights
from server.engine.fusing.kernels.rows import SlotTable
from server.engine.fusing.kernels.wrapper import CpuLoRA, transpose_stacks

Tenancy = tuple[str, int]
"""Bank and fused rank: adapters that agree in both fill the same cells of a slot."""


class FusedLoRAModel(LoRAModel):  # type: ignore[misc]
    """An adapter that was fused here; vLLM's objects for each module's A and B are made only where vLLM writes it.

    Args:
        lora_id: vLLM's id.
        recipe: the name it was fused from.
        weights: A and B by the bank's module names.
        vllm_names: vLLM's name for each of those modules.
        tenancy: see `Tenancy`.
        shares_a: whether all adapters of the bank share one A.
    """

    def __init__(
        self,
        lora_id: int,
        recipe: str,
        weights: LoraWeights,
        vllm_names: Mapping[str, str],
        *,
        tenancy: Tenancy,
        shares_a: bool,
    ) -> None:
        super().__init__(lora_id, weights.rank, {})
        self.recipe, self.tenancy, self.shares_a = recipe, tenancy, shares_a
        self._weights, self._vllm_names = weights, vllm_names

    def unpack(self) -> None:
        """Offer each module's A and B under vLLM's names."""
        rank, a, b = self._weights.rank, self._weights.a, self._weights.b
        self.loras = {
            name: LoRALayerWeights(name, rank, rank, a[module], b[module]) for module, name in self._vllm_names.items()
        }

    def written(self) -> list[torch.Tensor]:
        """The matrices that differ between adapters of one tenancy, always in the same order."""
        own = [self._weights.b] if self.shares_a else [self._weights.b, self._weights.a]
        return [matrices[module] for matrices in own for module in self._vllm_names]


class FusedSlots(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's two tiers, CPU and slots, with a record of whose cells each slot holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._note_nothing_written()
        for wrapper in self.punica_wrapper_mapping.values():
            if isinstance(wrapper, CpuLoRA):
                wrapper.watch(self._table)
                transpose_stacks(self.modules.values())

    def _note_nothing_written(self) -> None:
        self._tenants: list[Tenancy | None] = [None] * self.lora_slots
        self._recipes: list[str | None] = [None] * self.lora_slots
        self._cells: dict[tuple[int, Tenancy], list[torch.Tensor]] = {}
        self._table = SlotTable(self.lora_slots)

    @property
    def written(self) -> set[str]:
        """The recipes whose weights are in slots, including evicted ones that nothing has overwritten."""
        return {recipe for recipe in self._recipes if recipe is not None}

    def wipe(self, recipes: Set[str]) -> None:
        """Zero every slot that holds the weights of one of these recipes; its next tenant is written whole."""
        for index, recipe in enumerate(self._recipes):
            if recipe in recipes:
                self._tenants[index] = self._recipes[index] = None
                self._table.note(index)
                for module in self.modules.values():
                    module.reset_lora(index)

    def _add_adapter(self, lora: LoRAModel) -> None:
        """Register an adapter; a fused one is packed later, if at all."""
        if isinstance(lora, FusedLoRAModel):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Make sure that an adapter is in a slot, as the most recent; returns whether it had to be written."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        index = self.lora_index_to_id.index(None)
        model = self._registered_adapters[lora_id]
        self._recipes[index] = getattr(model, "recipe", None)
        self._table.note(index, model.rank, model.tenancy if getattr(model, "shares_a", False) else None)
        if not isinstance(model, FusedLoRAModel):
            self._tenants[index] = None
            super().activate_adapter(lora_id)  # takes the same slot: the first free one
        elif self._tenants[index] == model.tenancy:
            self._active_adapters[lora_id] = None
            self.lora_index_to_id[index] = lora_id
            self._overwrite(index, model)
        else:
            self._write(index, model)
        return True

    def _overwrite(self, index: int, model: FusedLoRAModel) -> None:
        """Copy an adapter over one of the same tenancy."""
        torch._foreach_copy_(self._cells[index, model.tenancy], model.written(), non_blocking=True)

    def _write(self, index: int, model: FusedLoRAModel) -> None:
        """Have vLLM pack an adapter and write it."""
        self._tenants[index] = None
        model.unpack()
        super()._add_adapter(model)
        super().activate_adapter(model.id)
        self._settle(index, model)
        model.loras = {}

    def _settle(self, index: int, model: FusedLoRAModel) -> None:
        """Note where the matrices of a slot's first tenant went, if vLLM copied each of them whole."""
        key = (index, model.tenancy)
        if key not in self._cells:
            if not self._is_plain(model):
                return
            cells = {
                id(matrix): stack[index, 0, : matrix.shape[0], : matrix.shape[1]]
                for stack, matrix in self._copies(model)
            }
            self._cells[key] = [cells[id(matrix)] for matrix in model.written()]
        self._tenants[index] = model.tenancy

    def _copies(self, model: FusedLoRAModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each matrix vLLM copies for a model, with the tensor over all slots it goes to."""
        for name, module in self.modules.items():
            layer = model.loras.get(name)
            if layer is not None:
                yield from _pairs(module.lora_b_stacked, layer.lora_b)
                yield from _pairs(module.lora_a_stacked, layer.lora_a)

    def _is_plain(self, model: FusedLoRAModel) -> bool:
        """Whether vLLM copies every matrix of such an adapter whole, into tensors [slots, 1, rows, columns]."""
        return all(
            module.tp_size == 1 and len(_listed(model.loras[name].lora_b)) == len(module.lora_b_stacked)
            for name, module in self.modules.items()
            if name in model.loras
        ) and all(stack.dim() == 4 and stack.shape[1] == 1 for stack, _ in self._copies(model))


def _listed(matrices: torch.Tensor | list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """One module's A or B as a list: vLLM packs several modules (q, k and v) into one."""
    return [matrices] if isinstance(matrices, torch.Tensor) else matrices


def _pairs(
    stacks: tuple[torch.Tensor, ...], matrices: torch.Tensor | list[torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for stack, matrix in zip(stacks, _listed(matrices), strict=True):
        if matrix is not None:
            yield stack, matrix
