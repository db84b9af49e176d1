"""The adapter manager of a worker: it keeps the banks, and gives each step's recipes a slot.

What makes an adapter of a recipe differs: `cpu/manager.py` sums rows ahead of the step, `gpu/manager.py` sums them on
the device as it writes the slot. The manager never evicts an adapter of the running batch, and never serves an id with
another recipe.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from adapters.flat import FlatLora
from adapters.fusion import TransposedSum, fuse_flat
from adapters.matrix import MetaMatrix
from adapters.recipe import is_recipe_name, parse_recipe
from adapters.user_adapter import decode_user_adapter, stack_flat
from bank.errors import BankError
from bank.manifest import BankManifest, read_manifest
from bank.matrix import open_matrix
from server.engine.fusing.metrics import timed
from server.engine.fusing.slots import FlatLoRAModel, FusedLoRAModel, FusedSlots
from server.settings import Settings


class FusingLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's LRU manager, extended to fuse recipes into slots; vLLM handles all other adapters."""

    _manager_cls = FusedSlots
    _adapter_manager: FusedSlots
    _waited_s: float = 0.0  # for the next adapter, before its step
    _sum_transposed: TransposedSum | None = None

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wrap the model's layers as vLLM does, then open the banks; raise BankError if a bank is broken or unfit."""
        if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
            raise BankError(
                f"--pipeline-parallel-size is {stages}: a bank's row needs all layers of the model in each worker: use "
                f"--tensor-parallel-size {stages}"
            )
        wrapped = super().create_lora_manager(model, vllm_config)
        self._users: dict[str, bytes] = {}  # serialised user adapters by the name of the stacked recipe
        self.metrics = self._adapter_manager.metrics
        self._matrices: dict[str, MetaMatrix] = {}
        self._vllm_names: dict[str, dict[str, str]] = {}
        for folder in Settings().banks:
            manifest = read_manifest(folder)
            matrix = open_matrix(folder, manifest)
            self._vllm_names[manifest.short] = self._adapter_manager.vllm_names(manifest.short, matrix.layout)
            self._matrices[manifest.short] = self._opened(manifest, matrix)
        return wrapped

    @abstractmethod
    def _opened(self, manifest: BankManifest, matrix: MetaMatrix) -> MetaMatrix:
        """Return the mapped matrix as `_model` reads it."""

    @abstractmethod
    def _model(self, lora_id: int, name: str) -> FusedLoRAModel:
        """Return the adapter of a recipe."""

    def _flat(self, name: str) -> FlatLora:
        recipe = parse_recipe(name)
        matrix, dtype = self._matrices[recipe.bank], self.lora_config.lora_dtype
        fused = fuse_flat(matrix, recipe, dtype, sum_transposed=self._sum_transposed)
        if recipe.user_adapter is None:
            return fused
        return stack_flat(fused, decode_user_adapter(matrix.layout, self._users[name]), dtype)

    def _model_of(self, lora_id: int, name: str, flat: FlatLora) -> FlatLoRAModel:
        bank = parse_recipe(name).bank
        shares_a = self._matrices[bank].shared_a is not None
        return FlatLoRAModel(lora_id, name, flat, self._vllm_names[bank], bank=bank, shares_a=shares_a)

    # Before a step

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """Write the adapters of the next step into slots; raise RuntimeError if slots are too few or ids ambiguous."""
        slots, wanted = self._adapter_manager, {request.lora_int_id: request for request in lora_requests if request}
        if len(wanted) > slots.lora_slots:
            raise RuntimeError(f"the step uses {len(wanted)} adapters, there are {slots.lora_slots} slots")
        if len(wanted) < len(lora_requests):
            raise RuntimeError(f"two adapters under one id in one step: {sorted(r.lora_name for r in lora_requests)}")
        # Mark the adapters of this step that are already here as most recently used, in both tiers, so that loading
        # the others does not evict them.
        for lora_id in wanted:
            slots.touch(lora_id)
        for lora_id, request in wanted.items():
            start, self._waited_s = time.perf_counter() - self._waited_s, 0.0
            self.add_adapter(request)
            if slots.activate_adapter(lora_id):
                self.metrics.bring_in.observe(time.perf_counter() - start)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Add an adapter to vLLM's tier before the slots, but to no slot; return whether it was new."""
        slots, lora_id, name = self._adapter_manager, lora_request.lora_int_id, lora_request.lora_name
        present = slots.get_adapter(lora_id)  # also marks the adapter as most recently used
        if present is not None:
            if not is_recipe_name(name) or slots.held_recipe(lora_id) == name:
                return False
            slots.remove_adapter(lora_id)  # never serve the former recipe of a reused id
        if is_recipe_name(name):
            self._register(self._model(lora_id, name))
        else:
            with timed(self.metrics.load):
                self._register(self._load_adapter(lora_request))
        return True

    def _register(self, model: LoRAModel) -> None:
        if len(self._adapter_manager) >= self._adapter_manager.capacity:
            self._adapter_manager.remove_oldest_adapter()
        self._adapter_manager.add_adapter(model)

    # Calls from the API process

    def hold(self, name: str, raw: bytes) -> None:
        """Keep the checked user adapter of a stacked recipe until `release`."""
        self._users[name] = raw

    def release(self, names: Sequence[str]) -> None:
        """Delete unused user adapters and all adapters fused with them, including those in slots."""
        gone = set(names)
        for name in gone:
            self._users.pop(name, None)
        for lora_id, model in list(self._adapter_manager.list_adapters().items()):
            if getattr(model, "recipe", None) in gone:
                self._adapter_manager.remove_adapter(lora_id)
        self._adapter_manager.wipe(gone)

    def held(self) -> list[str]:
        """Return the stacked recipes whose user adapter is still here, as bytes, in a fusion or in a slot."""
        names = {*self._users, *self._adapter_manager.written_recipes}
        return sorted(name for name in names if parse_recipe(name).user_adapter is not None)

    def resident(self) -> list[str]:
        models = self._adapter_manager.list_adapters().values()
        return [model.recipe for model in models if isinstance(model, FusedLoRAModel)]

    def measured(self) -> tuple[int, str]:
        """Return the number of slots in use, and this worker's metrics as text."""
        return self._adapter_manager.slots_taken, self.metrics.text


class WorkerExtension:
    """Mixed into vLLM's worker by `--worker-extension-cls`; the API process calls it through `collective_rpc`."""

    model_runner: Any

    def mta(self, act: str, *args: Any) -> Any:
        """Call the `FusingLoRAManager`'s `hold`, `release`, `held`, `resident` or `measured`."""
        return getattr(self.model_runner.lora_manager, act)(*args)
