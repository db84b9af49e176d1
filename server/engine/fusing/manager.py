"""The adapter manager of a worker: it sums the bank rows of each recipe and writes the sum into a slot.

The arrival of a request starts its fusion (`prefetch.py`). The name was checked before admission; should a fusion fail
all the same, the request ends before a step needs it (`admission/fair_scheduler.py`).
The step that runs the request writes the sum into a slot (`_apply_adapters`, `slots.py`). The manager never evicts an
adapter of the running batch, and never serves an id with another recipe.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import PIN_MEMORY

from adapters.flat import FlatLora
from adapters.fusion import TransposedSum, fuse_flat
from adapters.matrix import MetaMatrix
from adapters.recipe import is_recipe_name, parse_recipe
from adapters.user_adapter import decode_user_adapter, stack_flat
from bank.manifest import read_manifest
from bank.matrix import open_matrix
from server.engine import patches
from server.engine.fusing.prefetch import FusionPrefetcher
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots
from server.engine.metrics import timed
from server.settings import Settings


class FusingLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's LRU manager, extended to fuse recipes into slots; vLLM handles all other adapters."""

    _manager_cls = FusedSlots
    _adapter_manager: FusedSlots
    _waited_s: float = 0.0  # for the next adapter, before its step
    _sum_transposed: TransposedSum | None = None

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wrap the model's layers as vLLM does, then open the banks; raise BankError if a bank is broken or unfit."""
        wrapped = super().create_lora_manager(model, vllm_config)
        self._pinned = PIN_MEMORY and self.device.type != "cpu"  # copies to the GPU are fast only from pinned memory
        self._users: dict[str, bytes] = {}  # serialised user adapters by the name of the stacked recipe
        self.metrics = self._adapter_manager.metrics
        self._matrices: dict[str, MetaMatrix] = {}
        self._vllm_names: dict[str, dict[str, str]] = {}
        commons = list[str]()  # of banks whose prompts have a shared part
        for folder in Settings().banks:
            manifest = read_manifest(folder)
            commons += [manifest.common_recipe.name] * manifest.shares_prompts
            matrix = open_matrix(folder, manifest).prepared(self.lora_config.lora_dtype, pin_memory=self._pinned)
            if self._sum_transposed and manifest.directions:  # all of them are summed for every recipe
                matrix = matrix.with_packed()
            else:
                matrix.touch()
            self._matrices[manifest.short] = matrix
            self._vllm_names[manifest.short] = self._adapter_manager.vllm_names(manifest.short, matrix.layout)
        self._prefetcher = FusionPrefetcher(self._fuse)
        for name in commons:  # which the first step with an adapter needs
            self._prefetcher.start(name)
        prefetch_on_arrival(self)
        return wrapped

    # When a request arrives

    def prefetch(self, request: LoRARequest) -> None:
        """Start to fuse the adapter of a request, unless it is here; called from the thread that receives requests."""
        self._prefetcher.start(request.lora_name, needed=lambda: self._needs_fusion(request))

    def unfused(self, requests: Sequence[LoRARequest]) -> set[int]:
        """Queue the adapters of waiting requests in this order, and return the ids of those not fused yet."""
        needed = {request.lora_int_id: request.lora_name for request in requests if self._needs_fusion(request)}
        unfinished = self._prefetcher.unfinished(needed.values())
        return {lora_id for lora_id, name in needed.items() if name in unfinished}

    def wait_for(self, request: LoRARequest) -> None:
        start = time.perf_counter()
        self._prefetcher.wait(request.lora_name)
        self._waited_s = time.perf_counter() - start

    def failed(self, requests: Sequence[LoRARequest]) -> set[int]:
        """Return the ids of the adapters whose fusion failed, once; later requests try again."""
        failed = self._prefetcher.take_failed([request.lora_name for request in requests])
        return {request.lora_int_id for request in requests if request.lora_name in failed}

    def _needs_fusion(self, request: LoRARequest) -> bool:
        """Return whether a request's recipe is missing from the CPU tier; safe in any thread."""
        name: str = request.lora_name
        return is_recipe_name(name) and self._adapter_manager.held_recipe(request.lora_int_id) != name

    # In the prefetcher's thread

    def _fuse(self, name: str) -> FlatLora:
        with timed(self.metrics.fuse):
            flat = self._lay_out(self._flat(name))
        self._adapter_manager.prepare(self._model_of(1, name, flat))
        return flat

    def _flat(self, name: str) -> FlatLora:
        recipe = parse_recipe(name)
        matrix, dtype = self._matrices[recipe.bank], self.lora_config.lora_dtype
        fused = fuse_flat(matrix, recipe, dtype, sum_transposed=self._sum_transposed)
        if recipe.user_adapter is None:
            return fused
        return stack_flat(fused, decode_user_adapter(matrix.layout, self._users[name]), dtype)

    def _lay_out(self, flat: FlatLora) -> FlatLora:
        return flat.pinned() if self._pinned else flat

    def _model_of(self, lora_id: int, name: str, flat: FlatLora) -> FusedLoRAModel:
        bank = parse_recipe(name).bank
        shares_a = self._matrices[bank].shared_a is not None
        return FusedLoRAModel(lora_id, name, flat, self._vllm_names[bank], bank=bank, shares_a=shares_a)

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
        self._prefetcher.prioritise([request.lora_name for request in wanted.values() if self._needs_fusion(request)])
        for lora_id, request in wanted.items():
            start, self._waited_s = time.perf_counter() - self._waited_s, 0.0
            self.add_adapter(request)
            if slots.activate_adapter(lora_id):
                self.metrics.bring_in.observe(time.perf_counter() - start)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Add an adapter to the CPU tier, but to no slot; return whether it was new."""
        slots, lora_id, name = self._adapter_manager, lora_request.lora_int_id, lora_request.lora_name
        present = slots.get_adapter(lora_id)  # also marks the adapter as most recently used
        if present is not None:
            if not is_recipe_name(name) or slots.held_recipe(lora_id) == name:
                return False
            slots.remove_adapter(lora_id)  # never serve the former recipe of a reused id
        if is_recipe_name(name):
            self._register(self._model_of(lora_id, name, self._prefetcher.wait(name).result()))
            self._prefetcher.discard(name)
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
        """Keep the checked user adapter of a stacked recipe until `release`, and start to fuse the recipe."""
        self._users[name] = raw
        self._prefetcher.take_failed([name])  # a fusion without these bytes
        self._prefetcher.start(name)

    def release(self, names: Sequence[str]) -> None:
        """Delete unused user adapters and all adapters fused with them, including those in slots."""
        gone = set(names)
        for name in gone:
            self._users.pop(name, None)
        self._prefetcher.cancel(gone)
        for lora_id, model in list(self._adapter_manager.list_adapters().items()):
            if getattr(model, "recipe", None) in gone:
                self._adapter_manager.remove_adapter(lora_id)
        self._adapter_manager.wipe(gone)

    def held(self) -> list[str]:
        """Return the stacked recipes whose user adapter is still here, as bytes, in a fusion or in a slot."""
        fused = {*self._prefetcher.names, *self._adapter_manager.written_recipes}
        return sorted({*self._users, *(name for name in fused if parse_recipe(name).user_adapter is not None)})

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


def prefetch_on_arrival(manager: FusingLoRAManager) -> None:
    """Make this process's engine core, if any, pass each new request to `manager`, and `manager` to the scheduler."""
    if "vllm.v1.engine.core" not in sys.modules:
        return

    def with_prefetch(preprocess: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def prefetch_and_preprocess(self: Any, request: Any) -> Any:  # `patches.py` checks these parameter names
            if request.lora_request is not None:
                self.scheduler.adapter_manager = manager
                manager.prefetch(request.lora_request)
            return preprocess(self, request)

        return prefetch_and_preprocess

    patches.replace(patches.ARRIVAL, with_prefetch)
