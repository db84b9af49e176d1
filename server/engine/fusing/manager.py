"""The adapter manager of a worker: where a recipe becomes weights in a LoRA slot.

It replaces vLLM's LRU manager and differs in three ways. A recipe is fused from the mapped bank instead of read from
a folder, ahead of use where that can be (`fusing/ahead.py`), and that cannot fail: the name was checked before
admission. Eviction never takes what the running batch uses. And an id that holds a recipe other than the request's is
never used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import PIN_MEMORY

from adapters.flat import FlatLora
from adapters.fusion import fuse_flat
from adapters.layout import RowLayout
from adapters.matrix import MetaMatrix
from adapters.recipe import parse_recipe
from adapters.user_adapter import decode_user_adapter, stack_flat
from bank.errors import BankError
from server.engine.banks import is_recipe_name, open_matrices
from server.engine.fusing.ahead import Ahead, on_arrival
from server.engine.fusing.figures import WorkerFigures
from server.engine.fusing.kernels.check import check_in_use
from server.engine.fusing.kernels.native import kernels
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots
from server.settings import Settings


class FusingLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """Fuses recipes into slots; other adapters are left to vLLM."""

    _manager_cls = FusedSlots
    _matrices: Mapping[str, MetaMatrix]
    _vllm_names: Mapping[str, Mapping[str, str]]
    _users: dict[str, bytes]
    _ahead: Ahead[FlatLora]

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wrap the model's layers as vLLM does, then open the banks and check that they fit this model.

        Raises:
            BankError: when a bank is damaged or was made for a model with other modules, or when vLLM would apply
                adapters to rows that have none.
        """
        wrapped = super().create_lora_manager(model, vllm_config)
        check_in_use(self._adapter_manager.punica_wrapper_mapping.values())
        self._pinned = PIN_MEMORY and self.device.type != "cpu"  # GPU slots copy fast only from pinned pages
        self._users = {}
        self._matrices = {
            short: matrix.prepared(self.lora_config.lora_dtype, pin_memory=self._pinned)
            for short, matrix in open_matrices(Settings()).items()
        }
        self._vllm_names = {
            short: self._match_modules(short, matrix.layout) for short, matrix in self._matrices.items()
        }
        for matrix in self._matrices.values():
            matrix.touch()
        self._across = self._adapter_manager.lie_across
        compiled = kernels(Settings().cache_dir) if self._across else None
        self._sum_across = compiled.weighted_sum_across if compiled else None
        self._ahead = Ahead(self._fuse)
        on_arrival(self)
        return wrapped

    @property
    def figures(self) -> WorkerFigures:
        """What this worker measures."""
        figures: WorkerFigures = self._adapter_manager.figures
        return figures

    def _match_modules(self, short: str, layout: RowLayout) -> dict[str, str]:
        """Map the bank's module names to vLLM's, checking that each exists here."""
        mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        rename = mapper.get_rename_mapper() if mapper is not None else None
        known = set(self._adapter_manager.modules)
        for packed in self._adapter_manager.packed_modules.values():
            known |= set(packed)
        names = {}
        for module in layout.modules:
            name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module.name}.lora_A.weight", rename)
            if name not in known:
                raise BankError(
                    f"bank {short} adapts the module {module.name}, which this model does not offer to LoRA: the bank "
                    "was built for another base model"
                )
            names[module.name] = name
        return names

    def notice(self, request: LoRARequest) -> None:
        """Fuse what a request will need, unless it is here; called from the thread that receives requests."""
        self._ahead.begin(request.lora_name, needed=lambda: self._lacks(request))

    def _lacks(self, request: LoRARequest) -> bool:
        """Whether a request's recipe is not in the CPU tier; may be asked in any thread."""
        name: str = request.lora_name
        return is_recipe_name(name) and self._adapter_manager.held_recipe(request.lora_int_id) != name

    def unfused(self, requests: Sequence[LoRARequest]) -> set[int]:
        """The ids of waiting requests' adapters that are still to be fused; they are, in this order."""
        needed = {request.lora_int_id: request.lora_name for request in requests if self._lacks(request)}
        missing = self._ahead.missing(needed.values())
        return {lora_id for lora_id, name in needed.items() if name in missing}

    def _fuse(self, name: str) -> FlatLora:
        """What a recipe stands for, its user adapter included; runs in the thread of `Ahead`."""
        with self.figures.fuse.timed():
            flat = self._flat(name)
            flat = flat.across() if self._across else flat
            flat = flat.pinned() if self._pinned else flat
        self._adapter_manager.prepare(self._model_of(1, name, parse_recipe(name).bank, flat))
        return flat

    def _flat(self, name: str) -> FlatLora:
        recipe = parse_recipe(name)
        matrix, dtype = self._matrices[recipe.bank], self.lora_config.lora_dtype
        fused = fuse_flat(matrix, recipe, dtype, sum_across=self._sum_across)
        if recipe.user_adapter is None:
            return fused
        return stack_flat(fused, decode_user_adapter(matrix.layout, self._users[name]), dtype)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Make the adapter that a request names; runs inside `execute_model` on every rank."""
        if not is_recipe_name(lora_request.lora_name):
            return super()._load_adapter(lora_request)
        name: str = lora_request.lora_name
        return self._model_of(lora_request.lora_int_id, name, parse_recipe(name).bank, self._ahead.take(name))

    def _model_of(self, lora_id: int, name: str, bank: str, flat: FlatLora) -> FusedLoRAModel:
        shares_a = self._matrices[bank].shared_a is not None
        return FusedLoRAModel(lora_id, name, flat, self._vllm_names[bank], bank=bank, shares_a=shares_a)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """Put the adapters of the next step into slots.

        Raises:
            RuntimeError: when the step asks for more adapters than slots, or for two under one id.
        """
        wanted = {request.lora_int_id: request for request in lora_requests if request}
        if len(wanted) > self._adapter_manager.lora_slots:
            raise RuntimeError(
                f"the step uses {len(wanted)} adapters, there are {self._adapter_manager.lora_slots} slots"
            )
        if len(wanted) < len(lora_requests):
            raise RuntimeError(f"two adapters under one id in one step: {sorted(r.lora_name for r in lora_requests)}")
        # First make what this step uses and is already here the most recent, in both tiers: then whatever is evicted
        # for the rest is nothing that this step uses.
        for lora_id in wanted:
            self._adapter_manager.get_adapter(lora_id)
            self._adapter_manager._active_adapters.touch(lora_id)
        self._ahead.hurry([request.lora_name for request in wanted.values() if self._lacks(request)])
        for lora_id, request in wanted.items():
            start = time.perf_counter()
            self._ensure_registered(request)
            if self._adapter_manager.activate_adapter(lora_id):
                self.figures.bring_in.observe(time.perf_counter() - start)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Fuse ahead of use, between steps: only into the CPU tier, so that no slot of the batch is taken."""
        return self._ensure_registered(lora_request)

    def _ensure_registered(self, request: LoRARequest) -> bool:
        """Make sure that the adapter is in the CPU tier under its own name; returns whether it had to be made."""
        manager = self._adapter_manager
        present = manager.get_adapter(request.lora_int_id)  # also makes it the most recent
        if present is not None:
            if not is_recipe_name(request.lora_name) or getattr(present, "recipe", None) == request.lora_name:
                return False
            manager.remove_adapter(request.lora_int_id)  # a stale tenant of this id must never be served as the new one
        if is_recipe_name(request.lora_name):
            self._register(self._load_adapter(request))
            self._ahead.done(request.lora_name)
        else:
            with self.figures.load.timed():
                self._register(self._load_adapter(request))
        return True

    def _register(self, model: LoRAModel) -> None:
        """Take an adapter into the CPU tier, in place of the least recently used one if that is full."""
        if len(self._adapter_manager) >= self._adapter_manager.capacity:
            self._adapter_manager.remove_oldest_adapter()
        self._adapter_manager.add_adapter(model)

    def hold(self, name: str, raw: bytes) -> None:
        """Keep the user adapter of a stacked recipe, which has been checked, until `release`; fuse it ahead."""
        self._users[name] = raw
        self._ahead.begin(name)

    def release(self, names: Sequence[str]) -> None:
        """Forget user adapters that nothing uses, and what was fused with them, in slots too."""
        gone = set(names)
        for name in gone:
            self._users.pop(name, None)
        self._ahead.forget(gone)
        for lora_id, model in list(self._adapter_manager.list_adapters().items()):
            if getattr(model, "recipe", None) in gone:
                self._adapter_manager.remove_adapter(lora_id)
        self._adapter_manager.wipe(gone)

    def held(self) -> set[str]:
        """Stacked recipes whose user adapter is still here: as bytes, being fused, or fused into a slot."""
        fused = {*self._ahead.names, *self._adapter_manager.written}
        return set(self._users) | {name for name in fused if parse_recipe(name).user_adapter is not None}

    @property
    def slots_taken(self) -> int:
        """How many slots hold an adapter."""
        return len(self._adapter_manager._active_adapters)

    def resident(self) -> list[str]:
        """Recipes in the CPU tier, least recently used first."""
        models = self._adapter_manager.list_adapters().values()
        return [model.recipe for model in models if isinstance(model, FusedLoRAModel)]
