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
              └────────────────────────┘                 along H_out in memory (`cpu/slots.py`)
               lora_a_stacked[module][S, 0]

A `cat` bank has a block of A for each row of the recipe. vLLM writes a slot module by module: it packs q, k and v (or
gate and up) into one layer, then zeroes and copies both matrices. Here a few calls write all modules (`cpu/slots.py`,
`gpu/slots.py`). If the slot last held an adapter of the same bank and ranks, nothing is zeroed, because the same cells
are overwritten. In a `shared` bank the slot already has the frozen A, so only B and the user's A are written. vLLM
still writes adapters whose layers are not plain (mixtures of experts, fully sharded LoRAs).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
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
from server.engine.fusing.metrics import FusionMetrics, timed

Footprint = tuple[str, tuple[int, ...]]  # bank and ranks of the blocks of A; if equal, adapters fill the same cells
Stacks = list[tuple[torch.Tensor, torch.Tensor]]  # A and B over all slots, for each module of a bank


class FusedLoRAModel(LoRAModel):  # type: ignore[misc]
    """An adapter of a recipe, whose A has blocks of `ranks`.

    `bank` is the bank's 8 hex digits; `shares_a` says whether all adapters of the bank share the first block of A.
    """

    def __init__(self, lora_id: int, recipe: str, ranks: tuple[int, ...], *, bank: str, shares_a: bool) -> None:
        super().__init__(lora_id, sum(ranks), {})
        self.recipe, self.bank, self.shares_a = recipe, bank, shares_a
        self.footprint: Footprint = (bank, ranks)

    @property
    def shared_a_key(self) -> str | None:
        """Return a key that is equal for adapters with the same A in every module; None if the adapter adds its own."""
        return self.bank if self.shares_a and len(self.footprint[1]) == 1 else None


class FlatLoRAModel(FusedLoRAModel):
    """A fused adapter in memory; it creates vLLM's per-module objects only if vLLM writes the slot."""

    def __init__(
        self, lora_id: int, recipe: str, flat: FlatLora, vllm_names: Mapping[str, str], *, bank: str, shares_a: bool
    ) -> None:
        super().__init__(lora_id, recipe, flat.ranks, bank=bank, shares_a=shares_a)
        self.flat, self.vllm_names = flat, vllm_names

    def unpack(self) -> None:
        weights = self.flat.weights()
        self.loras = {
            name: LoRALayerWeights(name, weights.rank, weights.rank, weights.a[module], weights.b[module])
            for module, name in self.vllm_names.items()
        }


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
        position = self.lora_index_to_id.index(None)
        with timed(self.metrics.slot_write):
            self._write(position, self._registered_adapters[lora_id])
        return True

    def _write(self, position: int, model: LoRAModel) -> None:
        """Write an adapter into a free slot and register it with vLLM."""
        before = self._contents[position].footprint
        content = SlotContent(model.rank, getattr(model, "recipe", None), getattr(model, "shared_a_key", None))
        self._record(position, content)
        if isinstance(model, FusedLoRAModel) and self._writes(model):
            self._active_adapters[model.id] = None
            self.lora_index_to_id[position] = model.id
            self._overwrite(position, model, before)
            content.footprint = model.footprint  # set last, as a write may fail midway
            return
        if isinstance(model, FlatLoRAModel):
            model.unpack()
            super()._add_adapter(model)
        super().activate_adapter(model.id)  # uses the same slot, the first free one

    def _overwrite(self, position: int, model: FusedLoRAModel, before: Footprint | None) -> None:
        same_bank = before is not None and before[0] == model.bank
        if not same_bank:
            self._clear(position)
        is_clear = not same_bank or before == model.footprint
        self._write_cells(position, model, has_shared_a=same_bank and model.shares_a, padding_is_zero=is_clear)

    @abstractmethod
    def _writes(self, model: FusedLoRAModel) -> bool:
        """Return whether `_write_cells` writes such adapters, and not vLLM."""

    @abstractmethod
    def _write_cells(self, position: int, model: Any, *, has_shared_a: bool, padding_is_zero: bool) -> None:
        """Write an adapter; skip the first block of A or the padding if the slot already has the right values."""

    def _record(self, position: int, content: SlotContent) -> None:
        self._contents[position] = content

    def wipe(self, recipes: Set[str]) -> None:
        """Zero every slot that holds weights of one of these recipes; the next adapter is written completely."""
        for position, content in enumerate(self._contents):
            if content.recipe in recipes:
                self._record(position, SlotContent())
                self._clear(position)

    def _clear(self, position: int) -> None:
        for module in self.modules.values():
            module.reset_lora(position)

    def stacks(self, names: Sequence[str], *, sliced: bool = False) -> Stacks:
        """Return the tensors over all slots of modules by vLLM's names; empty if one is not plain.

        A module is plain if its adapters lie in a slot as they are, or with `sliced` as the layer cuts them for a rank.
        """
        stacks: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, module in self.modules.items():
            parts = self.packed_modules.get(name, [name])
            if (sliced or module.tp_size == 1) and len(parts) == len(module.lora_a_stacked):
                pairs = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
                stacks |= zip(parts, pairs, strict=True)
        plain = all(name in stacks and _is_plain(*stacks[name]) for name in names)
        return [stacks[name] for name in names] if plain else []


def _is_plain(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether both tensors have the shape [slots, 1, rows, columns], with A contiguous in each slot."""
    return all(stack.dim() == 4 and stack.shape[1] == 1 for stack in (a, b)) and a[0].is_contiguous()
