"""Entry point `vllm.general_plugins`: runs in every vLLM process, possibly more than once, before models load."""

from __future__ import annotations

import os

from bank.errors import BankError
from server.engine_protocol import PLUGIN


def register() -> None:
    """Make vLLM's workers fuse recipes if MTA_BANK is set; raise BankError for a wrong setup or version of vLLM."""
    if not os.environ.get("MTA_BANK"):
        return
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        raise BankError(
            f"MTA_BANK is set but VLLM_PLUGINS is {os.environ.get('VLLM_PLUGINS')!r}: set VLLM_PLUGINS={PLUGIN}, "
            "or start the engine with `mta engine`"
        )
    from vllm.platforms import current_platform
    from vllm.v1.worker import lora_model_runner_mixin

    from server.engine import patches
    from server.engine.fusing.manager import FusingLoRAManager
    from server.engine.shared_part import CommonRecipes, install

    if issubclass(lora_model_runner_mixin.LRUCacheWorkerLoRAManager, FusingLoRAManager):
        return
    patches.check(patches.EVERYWHERE)
    if current_platform.is_cpu():
        from server.engine.cpu import core, lora, operators
        from server.engine.cpu.manager import CpuLoRAManager

        patches.check(patches.ON_CPU)
        lora.install()
        core.install()
        operators.install()
        manager: type[FusingLoRAManager] = CpuLoRAManager
    else:
        from server.engine.gpu.manager import GpuLoRAManager

        manager = GpuLoRAManager
    patches.replace(patches.MANAGER, lambda original: manager)
    if commons := CommonRecipes.served():
        install(commons, on_cpu=current_platform.is_cpu())
