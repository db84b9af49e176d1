"""Write fused adapters into vLLM's slots, and record what each slot holds.

A slot is one index S into each layer's tensors. For one module, with the bank's rank r and the user's rank u::

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

A `cat` bank has a block of A for each row of the recipe. vLLM writes a slot module by module: it packs q, k and v (or
gate and up) into one layer, then zeroes and copies both matrices. Here one call writes all modules (`cells.py`). If the
slot last held an adapter of the same bank and ranks, nothing is zeroed, because the same cells are overwritten. In a
`shared` bank the slot already has the frozen A, so only B and the user's A are copied. vLLM still writes adapters that
it slices first (tensor parallelism, mixtures of experts).
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
from server.engine.fusing.metrics import FusionMetrics, timed

Footprint = tuple[str, tuple[int, ...]]
"""Bank and ranks of the blocks of A; adapters with equal footprints fill the same cells of a slot."""

Stacks = list[tuple[torch.Tensor, torch.Tensor]]  # A and B over all slots, for each module of a bank


class FusedLoRAModel(LoRAModel):  # type: ignore[misc]
    """A fused adapter; it creates vLLM's per-module objects only if vLLM writes the slot.

    `bank` is the bank's 8 hex digits; `shares_a` says whether all adapters of the bank share the first block of A.
    """

    def __init__(
        self, lora_id: int, recipe: str, flat: FlatLora, vllm_names: Mapping[str, str], *, bank: str, shares_a: bool
    ) -> None:
        super().__init__(lora_id, flat.rank, {})
        self.recipe, self.flat, self.bank, self.shares_a = recipe, flat, bank, shares_a
        self.footprint: Footprint = (bank, flat.ranks)
        self._vllm_names = vllm_names

    def unpack(self) -> None:
        weights = self.flat.weights()
        self.loras = {
            name: LoRALayerWeights(name, weights.rank, weights.rank, weights.a[module], weights.b[module])
            for module, name in self._vllm_names.items()
        }

    @property
    def shared_a_key(self) -> str | None:
        """Return a key that is equal for adapters with the same A in every module; None if the adapter adds its own."""
        return self.bank if self.shares_a and len(self.flat.a) == 1 else None

    @property
    def names(self) -> list[str]:
        return [self._vllm_names[module.name] for module in self.flat.modules]


@dataclass(slots=True)
class SlotContent:
    """Content of a slot, including the weights of an evicted adapter until another one overwrites them."""

    rank: int | None = None  # None if unknown
    recipe: str | None = None  # None unless the adapter was fused here
    shared_a_key: str | None = None
    footprint: Footprint | None = None  # None if the next adapter must be written completely


class FusedSlots(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's two tiers (CPU and slots), with a record of the content of each slot."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reset_records()

    def _reset_records(self) -> None:
        self.metrics = FusionMetrics()
        self._contents = [SlotContent() for _ in range(self.lora_slots)]
        self._recipes: dict[int, str] = {}  # recipes in the CPU tier by id: reading vLLM's cache changes its LRU order
        self._cells: dict[Footprint, list[Cells]] = {}
        self._stacks: dict[str, Stacks] = {}

    def vllm_names(self, bank: str, layout: RowLayout) -> dict[str, str]:
        """Return vLLM's names by module of a bank; raise BankError if this model lacks one of the modules."""
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
    def written_recipes(self) -> set[str]:
        """Return the recipes whose weights are in slots, including evicted ones that are not overwritten yet."""
        return {content.recipe for content in self._contents if content.recipe is not None}

    @property
    def slots_taken(self) -> int:
        return len(self._active_adapters)

    def held_recipe(self, lora_id: int) -> str | None:
        """Return the recipe that the CPU tier holds under an id; safe in any thread."""
        return self._recipes.get(lora_id)

    def touch(self, lora_id: int) -> None:
        """Mark an adapter as most recently used in both tiers, if present."""
        self.get_adapter(lora_id)
        self._active_adapters.touch(lora_id)

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, FusedLoRAModel):
            self._registered_adapters[lora.id] = lora
            self._recipes[lora.id] = lora.recipe
        else:
            super()._add_adapter(lora)

    def deactivate_adapter(self, adapter_id: int) -> bool:
        """Deactivate an adapter as vLLM does; the CPU tier also calls this after it removes an adapter."""
        if adapter_id not in self._registered_adapters:
            self._recipes.pop(adapter_id, None)
        deactivated: bool = super().deactivate_adapter(adapter_id)
        return deactivated

    def activate_adapter(self, lora_id: int) -> bool:
        """Ensure that an adapter is in a slot and most recently used; return whether it had to be written."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
            self.metrics.evictions.inc()
        index = self.lora_index_to_id.index(None)
        with timed(self.metrics.slot_write):
            self._write(index, self._registered_adapters[lora_id])
        return True

    def _write(self, index: int, model: LoRAModel) -> None:
        """Write an adapter into a free slot and register it with vLLM."""
        before = self._contents[index].footprint
        content = SlotContent(model.rank, getattr(model, "recipe", None), getattr(model, "shared_a_key", None))
        self._record(index, content)
        if isinstance(model, FusedLoRAModel) and self._stacks_of(model):
            self._active_adapters[model.id] = None
            self.lora_index_to_id[index] = model.id
            self._overwrite(index, model, before)
            content.footprint = model.footprint  # set last, as a write may fail midway
            return
        if isinstance(model, FusedLoRAModel):
            model.unpack()
            super()._add_adapter(model)
        super().activate_adapter(model.id)  # uses the same slot, the first free one

    def _overwrite(self, index: int, model: FusedLoRAModel, before: Footprint | None) -> None:
        same_bank = before is not None and before[0] == model.bank
        if not same_bank:
            self._clear(index)
        is_clear = not same_bank or before == model.footprint
        self._cells_of(model)[index].write(model.flat, has_shared_a=same_bank, padding_is_zero=is_clear)

    def _record(self, index: int, content: SlotContent) -> None:
        self._contents[index] = content

    def wipe(self, recipes: Set[str]) -> None:
        """Zero every slot that holds weights of one of these recipes; the next adapter is written completely."""
        for index, content in enumerate(self._contents):
            if content.recipe in recipes:
                self._record(index, SlotContent())
                self._clear(index)

    def _clear(self, index: int) -> None:
        for module in self.modules.values():
            module.reset_lora(index)

    def prepare(self, model: FusedLoRAModel) -> None:
        """Compute the cells of adapters like this one ahead of a step, in any thread; it takes about 0.1 s."""
        if self._stacks_of(model):
            self._cells_of(model)

    def _cells_of(self, model: FusedLoRAModel) -> list[Cells]:
        if model.footprint not in self._cells:
            self._cells[model.footprint] = Cells.of_slots(self._stacks_of(model), model.flat.ranks, model.shares_a)
        return self._cells[model.footprint]

    def _stacks_of(self, model: FusedLoRAModel) -> Stacks:
        """Return the tensors of the adapter's modules over all slots; empty if vLLM slices adapters first."""
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
    """Return whether both tensors have the shape [slots, 1, rows, columns], with A contiguous in each slot."""
    return all(stack.dim() == 4 and stack.shape[1] == 1 for stack in (a, b)) and a[0].is_contiguous()
