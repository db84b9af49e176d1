"""What is in vLLM's slots, and how a fused adapter is written into one.

A slot is one index S into each layer's tensors. Of one module, with the bank's rank r and a user's rank u::

                ◀──────── H_in ────────▶                 ◀── r ──▶◀─ u ─▶◀ rest ▶
              ┌────────────────────────┐                ┌─────────┬──────┬──────┐ ▲
            r │ block 0: the bank's A, │                │         │      │      │ │
              │ in a `shared` bank the │                │  fused  │ the  │      │ │
              │ same for all           │             B  │    B    │user's│  0   │ H_out
         A    ├────────────────────────┤                │         │  B   │      │ │
            u │ block 1: the user's A  │                │         │      │      │ │
              ├────────────────────────┤                └─────────┴──────┴──────┘ ▼
         rest │ 0                      │                 lora_b_stacked[module][S, 0]; on CPUs it lies
              └────────────────────────┘                 along H_out in memory (`cpu/lora.py`)
               lora_a_stacked[module][S, 0]

A `cat` bank has a block of A for each row of the recipe. vLLM fills a slot module by module: it packs q, k and v (gate
and up) into one, zeroes both matrices, copies both. Here one call writes all modules (`cells.py`). Over a tenant of the
same bank and ranks nothing is zeroed, because the same cells are written again; in a `shared` bank the one A is there
already, and only B is copied, and what a user adds to A. What vLLM slices first (tensor parallelism, mixtures of
experts) is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import parse_fine_tuned_lora_name

from adapters.flat import FlatLora
from adapters.lora import RowLayout
from bank.errors import BankError
from server.engine.fusing.cells import Cells
from server.engine.fusing.figures import WorkerFigures, timed

Filling = tuple[str, tuple[int, ...]]
"""Bank and the ranks of the blocks of A: adapters that agree in both fill the same cells of a slot."""

Stacks = list[tuple[torch.Tensor, torch.Tensor]]  # A and B of each of a bank's modules, over all slots


class FusedLoRAModel(LoRAModel):  # type: ignore[misc]
    """An adapter that was fused here; vLLM's objects for each module's A and B are made only where vLLM writes it.

    `bank` is a recipe's 8 hex digits; `shares_a`: the first block of A is the same for all adapters of the bank.
    """

    def __init__(
        self, lora_id: int, recipe: str, flat: FlatLora, vllm_names: Mapping[str, str], *, bank: str, shares_a: bool
    ) -> None:
        super().__init__(lora_id, flat.rank, {})
        self.recipe, self.flat, self.bank, self.shares_a = recipe, flat, bank, shares_a
        self.filling: Filling = (bank, flat.ranks)
        self._vllm_names = vllm_names

    def unpack(self) -> None:
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
        return [self._vllm_names[module.name] for module in self.flat.modules]


@dataclass(slots=True)
class Tenant:
    """What lies in a slot: also of an adapter that lost the slot, until another one is written over it."""

    rank: int | None = None  # None where nothing is known of it
    recipe: str | None = None  # None for an adapter that was not fused here
    same_a: str | None = None
    filling: Filling | None = None  # None where the next tenant must be written whole


class FusedSlots(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's two tiers, CPU and slots, with a record of what each slot holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._note_nothing_written()

    def _note_nothing_written(self) -> None:
        self.figures = WorkerFigures()
        self._tenants = [Tenant() for _ in range(self.lora_slots)]
        self._recipes: dict[int, str] = {}  # of the CPU tier, by id: vLLM's cache cannot be read without moving it
        self._cells: dict[Filling, list[Cells]] = {}
        self._stacks: dict[str, Stacks] = {}

    def vllm_names(self, bank: str, layout: RowLayout) -> dict[str, str]:
        """vLLM's name for each of a bank's modules; BankError when this model does not have one of them."""
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        rename = mapper.get_rename_mapper() if mapper is not None else None
        known = {*self.modules, *(name for packed in self.packed_modules.values() for name in packed)}
        names = {}
        for module in layout.modules:
            name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module.name}.lora_A.weight", rename)
            if name not in known:
                raise BankError(
                    f"bank {bank} adapts the module {module.name}, which this model does not offer to LoRA: the bank "
                    "was built for another base model"
                )
            names[module.name] = name
        return names

    @property
    def written(self) -> set[str]:
        """The recipes whose weights are in slots, including evicted ones that nothing has overwritten."""
        return {tenant.recipe for tenant in self._tenants if tenant.recipe is not None}

    @property
    def taken(self) -> int:
        return len(self._active_adapters)

    def held_recipe(self, lora_id: int) -> str | None:
        """The recipe that the CPU tier has under an id; may be asked in any thread."""
        return self._recipes.get(lora_id)

    def touch(self, lora_id: int) -> None:
        """Make an adapter the most recent of both tiers, if it is there."""
        self.get_adapter(lora_id)
        self._active_adapters.touch(lora_id)

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, FusedLoRAModel):
            self._registered_adapters[lora.id] = lora
            self._recipes[lora.id] = lora.recipe
        else:
            super()._add_adapter(lora)

    def deactivate_adapter(self, adapter_id: int) -> bool:
        """As vLLM's; the CPU tier calls it for what it has just removed."""
        if adapter_id not in self._registered_adapters:
            self._recipes.pop(adapter_id, None)
        deactivated: bool = super().deactivate_adapter(adapter_id)
        return deactivated

    def activate_adapter(self, lora_id: int) -> bool:
        """Make sure that an adapter is in a slot, as the most recent; returns whether it had to be written."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
            self.figures.evictions.inc()
        index = self.lora_index_to_id.index(None)
        with timed(self.figures.slot_write):
            self._write(index, self._registered_adapters[lora_id])
        return True

    def _write(self, index: int, model: LoRAModel) -> None:
        """Write an adapter into a free slot and say so to vLLM."""
        before = self._tenants[index].filling
        tenant = Tenant(model.rank, getattr(model, "recipe", None), getattr(model, "same_a", None))
        self._put(index, tenant)
        if isinstance(model, FusedLoRAModel) and self._stacks_of(model):
            self._active_adapters[model.id] = None
            self.lora_index_to_id[index] = model.id
            self._overwrite(index, model, before)
            tenant.filling = model.filling  # only now: the writing may have failed midway
            return
        if isinstance(model, FusedLoRAModel):
            model.unpack()
            super()._add_adapter(model)
        super().activate_adapter(model.id)  # takes the same slot: the first free one

    def _overwrite(self, index: int, model: FusedLoRAModel, before: Filling | None) -> None:
        same_bank = before is not None and before[0] == model.bank
        if not same_bank:
            self._clear(index)
        is_clear = not same_bank or before == model.filling
        self._cells_of(model)[index].write(model.flat, a_is_there=same_bank, rest_is_clear=is_clear)

    def _put(self, index: int, tenant: Tenant) -> None:
        self._tenants[index] = tenant

    def wipe(self, recipes: Set[str]) -> None:
        """Zero every slot that holds the weights of one of these recipes; its next tenant is written whole."""
        for index, tenant in enumerate(self._tenants):
            if tenant.recipe in recipes:
                self._put(index, Tenant())
                self._clear(index)

    def _clear(self, index: int) -> None:
        for module in self.modules.values():
            module.reset_lora(index)

    def prepare(self, model: FusedLoRAModel) -> None:
        """Find out in any thread, ahead of a step, where adapters like this one lie: it takes a tenth of a second."""
        if self._stacks_of(model):
            self._cells_of(model)

    def _cells_of(self, model: FusedLoRAModel) -> list[Cells]:
        if model.filling not in self._cells:
            self._cells[model.filling] = Cells.of_slots(self._stacks_of(model), model.flat.ranks, model.shares_a)
        return self._cells[model.filling]

    def _stacks_of(self, model: FusedLoRAModel) -> Stacks:
        """The tensors over all slots of the model's modules; empty where vLLM slices first."""
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
