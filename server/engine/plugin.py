"""Entry point `vllm.general_plugins`: runs in every vLLM process, possibly more than once, before models load."""

from __future__ import annotations

import os
import sys
from typing import Any

from bank.errors import BankError
from server.engine_protocol import PLUGIN


def register() -> None:
    """Replace vLLM's adapter manager with ours, where this vLLM serves a bank (`MTA_BANK` is set).

    Raises:
        BankError: when `VLLM_PLUGINS` does not name the plugin: vLLM would start without our routes; or when this
            vLLM would apply LoRA on CPU to rows that have no adapter.
    """
    if not os.environ.get("MTA_BANK"):
        return
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        raise BankError(
            f"MTA_BANK is set but VLLM_PLUGINS is {os.environ.get('VLLM_PLUGINS')!r}: set VLLM_PLUGINS={PLUGIN}, "
            "or start the engine with `mta engine`"
        )
    from vllm.lora import worker_manager

    from server.engine import forked_core
    from server.engine.fusing.kernels import check
    from server.engine.fusing.manager import FusingLoRAManager

    worker_manager.LRUCacheWorkerLoRAManager = FusingLoRAManager
    runner = sys.modules.get("vllm.v1.worker.lora_model_runner_mixin")
    if runner is not None:  # it binds the class by name when it is imported, which may be before us
        runner.LRUCacheWorkerLoRAManager = FusingLoRAManager  # type: ignore[attr-defined]
    check.install()
    forked_core.install()
    _keep_attention_off_amx()
    _let_seeds_begin_again()


def _keep_attention_off_amx() -> None:
    """Have CPUs with AMX compute attention with AVX-512.

    The AMX kernel of vLLM 0.32 runs `tilezero` on threads whose tiles were never configured: with a model that has as
    many key heads as query heads, a prompt of one token kills the engine with SIGILL.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends import cpu_attn

    choose = cpu_attn._get_attn_isa

    def choose_but_amx(*args: Any, **kwargs: Any) -> str:
        isa: str = choose(*args, **kwargs)
        return "vec" if isa == "amx" else isa

    cpu_attn._get_attn_isa = choose_but_amx


def _let_seeds_begin_again() -> None:
    """Have CPUs' seeded generators take back draws, as vLLM asks of them.

    A prompt that is read in several steps is sampled at the end of each, and what is drawn before the last is taken
    back by moving the generator's offset. Generators on CPU have none: with vLLM 0.32 a request with a seed and a
    temperature whose prompt does not fit into a step beside others ends the engine. Nothing that counts was drawn
    before, so the generator begins again; an answer that made way for others midway draws the same numbers twice.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    class BeginningAgain(torch.Generator):
        def get_offset(self) -> int:
            return 0

        def set_offset(self, offset: int) -> torch.Generator:
            return self.manual_seed(self.initial_seed())

    settle = CachedRequestState.__post_init__

    def settle_with_generator(state: Any) -> None:
        settle(state)
        if state.generator is not None:
            state.generator = BeginningAgain().manual_seed(state.generator.initial_seed())

    CachedRequestState.__post_init__ = settle_with_generator
