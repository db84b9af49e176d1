"""The adapter manager on CPUs: a thread sums the rows of a recipe ahead of the step that writes the sum into a slot.

The arrival of a request starts its fusion (`prefetch.py`). The name was checked before admission; should a fusion fail
all the same, the request ends before a step needs it (`admission/fair_scheduler.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest

from adapters.flat import FlatLora
from adapters.matrix import MetaMatrix
from adapters.recipe import is_recipe_name, parse_recipe
from bank.manifest import BankManifest
from server.engine import patches
from server.engine.cpu.native import kernels
from server.engine.cpu.prefetch import FusionPrefetcher
from server.engine.cpu.slots import CpuSlots
from server.engine.fusing.manager import FusingLoRAManager
from server.engine.fusing.metrics import timed
from server.engine.fusing.slots import FlatLoRAModel
from server.engine.shared_part import CommonRecipes
from server.settings import Settings


class CpuLoRAManager(FusingLoRAManager):
    """Sums rows with the compiled kernel, if available, and stores B in the layout of the slots."""

    _manager_cls = CpuSlots
    _adapter_manager: CpuSlots

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        compiled = kernels(Settings().cache_dir)
        if compiled and self.lora_config.lora_dtype is torch.bfloat16:  # the only type that the kernel sums
            self._sum_transposed = compiled.weighted_sum_transposed.default
        wrapped = super().create_lora_manager(model, vllm_config)
        self._prefetcher = FusionPrefetcher(self._fuse)
        for common in CommonRecipes.served().by_bank.values():  # which the first step with an adapter needs
            self._prefetcher.start(common.lora_name)
        prefetch_on_arrival(self)
        return wrapped

    def _opened(self, manifest: BankManifest, matrix: MetaMatrix) -> MetaMatrix:
        matrix = matrix.prepared(self.lora_config.lora_dtype)
        if self._sum_transposed and manifest.directions:  # all of them are summed for every recipe
            return matrix.with_packed()
        matrix.touch()
        return matrix

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
            flat = self._flat(name).transposed()
        self._adapter_manager.prepare(self._model_of(1, name, flat))
        return flat

    # Before a step

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        self._prefetcher.prioritise([each.lora_name for each in lora_requests if each and self._needs_fusion(each)])
        super()._apply_adapters(lora_requests)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        added = super().add_adapter(lora_request)
        if added:
            self._prefetcher.discard(lora_request.lora_name)
        return added

    def _model(self, lora_id: int, name: str) -> FlatLoRAModel:
        return self._model_of(lora_id, name, self._prefetcher.wait(name).result())

    # Calls from the API process

    def hold(self, name: str, raw: bytes) -> None:
        """Keep the user adapter as on any device, and start to fuse the recipe."""
        super().hold(name, raw)
        self._prefetcher.take_failed([name])  # a fusion without these bytes
        self._prefetcher.start(name)

    def release(self, names: Sequence[str]) -> None:
        super().release(names)
        self._prefetcher.cancel(set(names))

    def held(self) -> list[str]:
        fused = (name for name in self._prefetcher.names if parse_recipe(name).user_adapter is not None)
        return sorted({*super().held(), *fused})


def prefetch_on_arrival(manager: CpuLoRAManager) -> None:
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
