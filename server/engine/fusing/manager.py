"""A worker's loop for adapters: a recipe comes in, rows of its bank are summed, a slot is written.

A request's arrival starts its fusion (`notice`, `ahead.py`), which cannot fail, because the name was checked before
admission. The step that runs the request writes the sum into a slot (`_apply_adapters`, `slots.py`): what the running
batch uses is never evicted, nor is an id with another recipe used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import PIN_MEMORY

from adapters.flat import FlatLora
from adapters.fusion import SumAcross, fuse_flat
from adapters.matrix import MetaMatrix
from adapters.recipe import is_recipe_name, parse_recipe
from adapters.user_adapter import decode_user_adapter, stack_flat
from bank.manifest import read_manifest
from bank.matrix import open_matrix
from server.engine.fusing.ahead import Ahead, on_arrival
from server.engine.fusing.figures import WorkerFigures, timed
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots
from server.settings import Settings


class FusingLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's LRU manager, with recipes fused into slots; other adapters are left to vLLM."""

    _manager_cls = FusedSlots
    _adapter_manager: FusedSlots
    _matrices: dict[str, MetaMatrix]
    _vllm_names: Mapping[str, Mapping[str, str]]
    _users: dict[str, bytes]  # user adapters by the recipe that names them, as they are kept
    _ahead: Ahead[FlatLora]
    _pinned: bool
    _sum_across: SumAcross | None = None

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wrap the model's layers as vLLM does, then open the banks; BankError unless they are whole and fit it."""
        wrapped = super().create_lora_manager(model, vllm_config)
        self._pinned = PIN_MEMORY and self.device.type != "cpu"  # GPU slots copy fast only from pinned pages
        self._users = {}
        self._matrices = {}
        for folder in Settings().banks:
            manifest = read_manifest(folder)
            matrix = open_matrix(folder, manifest).prepared(self.lora_config.lora_dtype, pin_memory=self._pinned)
            self._matrices[manifest.short] = matrix
        slots = self._adapter_manager
        self._vllm_names = {bank: slots.vllm_names(bank, matrix.layout) for bank, matrix in self._matrices.items()}
        for matrix in self._matrices.values():
            matrix.touch()
        self._ahead = Ahead(self._fuse)
        on_arrival(self)
        return wrapped

    # A request has arrived

    def notice(self, request: LoRARequest) -> None:
        """Fuse what a request will need, unless it is here; called from the thread that receives requests."""
        self._ahead.begin(request.lora_name, needed=lambda: self._lacks(request))

    def unfused(self, requests: Sequence[LoRARequest]) -> set[int]:
        """The ids of waiting requests' adapters that are still to be fused; they are, in this order."""
        needed = {request.lora_int_id: request.lora_name for request in requests if self._lacks(request)}
        missing = self._ahead.missing(needed.values())
        return {lora_id for lora_id, name in needed.items() if name in missing}

    def _lacks(self, request: LoRARequest) -> bool:
        """Whether a request's recipe is not in the CPU tier; may be asked in any thread."""
        name: str = request.lora_name
        return is_recipe_name(name) and self._adapter_manager.held_recipe(request.lora_int_id) != name

    # Its rows are summed, in the thread of `Ahead`

    def _fuse(self, name: str) -> FlatLora:
        with timed(self.figures.fuse):
            flat = self._lay_out(self._flat(name))
        self._adapter_manager.prepare(self._model_of(1, name, flat))
        return flat

    def _flat(self, name: str) -> FlatLora:
        recipe = parse_recipe(name)
        matrix, dtype = self._matrices[recipe.bank], self.lora_config.lora_dtype
        fused = fuse_flat(matrix, recipe, dtype, sum_across=self._sum_across)
        if recipe.user_adapter is None:
            return fused
        return stack_flat(fused, decode_user_adapter(matrix.layout, self._users[name]), dtype)

    def _lay_out(self, flat: FlatLora) -> FlatLora:
        return flat.pinned() if self._pinned else flat

    def _model_of(self, lora_id: int, name: str, flat: FlatLora) -> FusedLoRAModel:
        bank = parse_recipe(name).bank
        shares_a = self._matrices[bank].shared_a is not None
        return FusedLoRAModel(lora_id, name, flat, self._vllm_names[bank], bank=bank, shares_a=shares_a)

    # A step is about to run it: its slot is written

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """Put the adapters of the next step into slots; RuntimeError for more than there are, or two under one id."""
        slots, wanted = self._adapter_manager, {request.lora_int_id: request for request in lora_requests if request}
        if len(wanted) > slots.lora_slots:
            raise RuntimeError(f"the step uses {len(wanted)} adapters, there are {slots.lora_slots} slots")
        if len(wanted) < len(lora_requests):
            raise RuntimeError(f"two adapters under one id in one step: {sorted(r.lora_name for r in lora_requests)}")
        # First make what this step uses and is already here the most recent, in both tiers: then whatever is evicted
        # for the rest is nothing that this step uses.
        for lora_id in wanted:
            slots.touch(lora_id)
        self._ahead.hurry([request.lora_name for request in wanted.values() if self._lacks(request)])
        for lora_id, request in wanted.items():
            start = time.perf_counter()
            self.add_adapter(request)
            if slots.activate_adapter(lora_id):
                self.figures.bring_in.observe(time.perf_counter() - start)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Bring an adapter into the CPU tier under its own name, and into no slot; returns whether it was made now."""
        slots, lora_id, name = self._adapter_manager, lora_request.lora_int_id, lora_request.lora_name
        present = slots.get_adapter(lora_id)  # also makes it the most recent
        if present is not None:
            if not is_recipe_name(name) or slots.held_recipe(lora_id) == name:
                return False
            slots.remove_adapter(lora_id)  # a stale tenant of this id must never be served as the new one
        if is_recipe_name(name):
            self._register(self._model_of(lora_id, name, self._ahead.take(name)))
            self._ahead.done(name)
        else:
            with timed(self.figures.load):
                self._register(self._load_adapter(lora_request))
        return True

    def _register(self, model: LoRAModel) -> None:
        if len(self._adapter_manager) >= self._adapter_manager.capacity:
            self._adapter_manager.remove_oldest_adapter()
        self._adapter_manager.add_adapter(model)

    # User adapters, and what the API process asks

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

    def held(self) -> list[str]:
        """Stacked recipes whose user adapter is still here: as bytes, being fused, or fused into a slot."""
        fused = {*self._ahead.names, *self._adapter_manager.written}
        return sorted({*self._users, *(name for name in fused if parse_recipe(name).user_adapter is not None)})

    def resident(self) -> list[str]:
        models = self._adapter_manager.list_adapters().values()
        return [model.recipe for model in models if isinstance(model, FusedLoRAModel)]

    def measured(self) -> tuple[int, str]:
        """How many slots are taken, and the figures of this worker."""
        return self._adapter_manager.taken, self.figures.text

    @property
    def figures(self) -> WorkerFigures:
        return self._adapter_manager.figures


class WorkerExtension:
    """`--worker-extension-cls`: mixed into vLLM's worker, where the API process calls it (`collective_rpc`)."""

    model_runner: Any

    def mta(self, act: str, *args: Any) -> Any:
        """One of the manager's `hold`, `release`, `held`, `resident`, `measured`."""
        manager = self.model_runner.lora_manager
        if not isinstance(manager, FusingLoRAManager):
            raise RuntimeError(f"the worker's adapter manager is {type(manager).__name__}, not FusingLoRAManager")
        return getattr(manager, act)(*args)
