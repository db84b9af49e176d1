"""vLLM's own slots for fused adapters, with a shortcut from one recipe of a bank to the next.

vLLM fills a slot module by module: it packs q, k and v (gate and up) into one, zeroes both matrices, copies both. Here
all modules are written in one call (`fusing/cells.py`). A slot whose last tenant was of the same bank and rank needs no
zeroing, because the same cells are written again; in a `shared` bank it already holds the one A, so that only B is
copied, and what a user adds to A. Whatever vLLM slices first (tensor parallelism, mixtures of experts) is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from adapters.flat import FlatLora
from server.engine.fusing.cells import Cells, lies_across
from server.engine.fusing.figures import WorkerFigures
from server.engine.fusing.kernels.rows import SlotTable
from server.engine.fusing.kernels.wrapper import CpuLoRA, transpose_stacks

Tenancy = tuple[str, tuple[int, ...]]
"""Bank and the ranks of the blocks of A: adapters that agree in both fill the same cells of a slot."""


class FusedLoRAModel(LoRAModel):  # type: ignore[misc]
    """An adapter that was fused here; vLLM's objects for each module's A and B are made only where vLLM writes it.

    Args:
        lora_id: vLLM's id.
        recipe: the name it was fused from.
        flat: A and B by the bank's module names.
        vllm_names: vLLM's name for each of those modules.
        bank: the first 8 hex digits of the bank's fingerprint.
        shares_a: whether the first block of A is the same for all adapters of the bank.
    """

    def __init__(
        self, lora_id: int, recipe: str, flat: FlatLora, vllm_names: Mapping[str, str], *, bank: str, shares_a: bool
    ) -> None:
        super().__init__(lora_id, flat.rank, {})
        self.recipe, self.flat, self.bank, self.shares_a = recipe, flat, bank, shares_a
        self.tenancy: Tenancy = (bank, flat.ranks)
        self._vllm_names = vllm_names

    def unpack(self) -> None:
        """Offer each module's A and B under vLLM's names."""
        weights = self.flat.weights()
        self.loras = {
            name: LoRALayerWeights(name, weights.rank, weights.rank, weights.a[module], weights.b[module])
            for module, name in self._vllm_names.items()
        }

    @property
    def same_a(self) -> str | None:
        """Equal for adapters that have the same A in every module; None for one that has an A of its own."""
        return self.bank if self.shares_a and len(self.flat.a) == 1 else None

    @property
    def names(self) -> list[str]:
        """vLLM's names of the modules, in the order in which they lie in `flat`."""
        return [self._vllm_names[module.name] for module in self.flat.modules]


class FusedSlots(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's two tiers, CPU and slots, with a record of whose cells each slot holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._note_nothing_written()
        ours = [wrapper for wrapper in self.punica_wrapper_mapping.values() if isinstance(wrapper, CpuLoRA)]
        for wrapper in ours:
            wrapper.watch(self._table)
        if ours:
            transpose_stacks(self.modules.values())

    def _note_nothing_written(self) -> None:
        self.figures = WorkerFigures()
        self._tenants: list[Tenancy | None] = [None] * self.lora_slots
        self._recipes: list[str | None] = [None] * self.lora_slots
        self._cells: dict[Tenancy, list[Cells]] = {}
        self._stacks: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._table = SlotTable(self.lora_slots)

    @property
    def lie_across(self) -> bool:
        """Whether B lies along H_out in the slots, so that an adapter's should, too, before it is written."""
        stacks = [stack for module in self.modules.values() for stack in getattr(module, "lora_b_stacked", ())]
        return any(lies_across(stack) for stack in stacks)

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
                self._clear(index)

    def held_recipe(self, lora_id: int) -> str | None:
        """The recipe that the CPU tier has under an id; may be asked in any thread."""
        return getattr(self._registered_adapters._Cache__data.get(lora_id), "recipe", None)  # reading moves nothing

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
            self.figures.evictions += 1
        index = self.lora_index_to_id.index(None)
        model = self._registered_adapters[lora_id]
        with self.figures.slot_write.timed():
            self._fill(index, model)
        return True

    def prepare(self, model: FusedLoRAModel) -> None:
        """Find out ahead of a step where adapters of a tenancy lie, in whichever thread.

        The first time it takes a tenth of a second for 64 slots of SmolLM2-135M.

        Args:
            model: one of the tenancy, under any id.
        """
        if self._stacks_of(model):
            self._cells_of(model)

    def _fill(self, index: int, model: LoRAModel) -> None:
        """Write an adapter into a free slot and say so to vLLM."""
        self._recipes[index] = getattr(model, "recipe", None)
        self._table.note(index, model.rank, getattr(model, "same_a", None))
        if isinstance(model, FusedLoRAModel) and self._stacks_of(model):
            self._active_adapters[model.id] = None
            self.lora_index_to_id[index] = model.id
            self._overwrite(index, model)
            return
        self._tenants[index] = None
        if isinstance(model, FusedLoRAModel):
            model.unpack()
            super()._add_adapter(model)
        super().activate_adapter(model.id)  # takes the same slot: the first free one

    def _overwrite(self, index: int, model: FusedLoRAModel) -> None:
        """Write an adapter over the last tenant, leaving nothing of it."""
        before, (bank, _) = self._tenants[index], model.tenancy
        same_bank = before is not None and before[0] == bank
        if not same_bank:
            self._clear(index)
        cells = self._cells_of(model)[index]
        self._tenants[index] = None  # should it fail midway
        cells.write(model.flat, a_is_there=same_bank, rest_is_clear=not same_bank or before == model.tenancy)
        self._tenants[index] = model.tenancy

    def _cells_of(self, model: FusedLoRAModel) -> list[Cells]:
        """Where adapters of its tenancy lie, by slot."""
        if model.tenancy not in self._cells:
            self._cells[model.tenancy] = Cells.of_slots(self._stacks_of(model), model.flat.ranks, model.shares_a)
        return self._cells[model.tenancy]

    def _clear(self, index: int) -> None:
        """Zero a slot."""
        for module in self.modules.values():
            module.reset_lora(index)

    def _stacks_of(self, model: FusedLoRAModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tensors over all slots for A and B of each of the model's modules; empty where vLLM slices first."""
        if model.bank not in self._stacks:
            stacks: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            for name, module in self.modules.items():
                parts = self.packed_modules.get(name, [name])
                if module.tp_size == 1 and len(parts) == len(module.lora_a_stacked):
                    pairs = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
                    stacks |= zip(parts, pairs, strict=True)
            plain = all(name in stacks and _is_plain(*stacks[name]) for name in model.names)
            self._stacks[model.bank] = [stacks[name] for name in model.names] if plain else []
        return self._stacks[model.bank]


def _is_plain(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors over all slots are of the shape [slots, 1, rows, columns], each slot's A without gaps."""
    return all(stack.dim() == 4 and stack.shape[1] == 1 for stack in (a, b)) and a[0].is_contiguous()
