"""Entry point `vllm.general_plugins`: runs in every vLLM process, possibly more than once, before models load."""

from __future__ import annotations

import os
import sys

from bank.errors import BankError

PLUGIN_NAME = "mta"


def register() -> None:
    """Put our adapter manager in the place of vLLM's, where this vLLM serves a bank (`MTA_BANK` is set).

    Raises:
        BankError: when `VLLM_PLUGINS` does not name the plugin, for vLLM would then start without our routes.
    """
    if not os.environ.get("MTA_BANK"):
        return
    if PLUGIN_NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        raise BankError(
            f"MTA_BANK is set but VLLM_PLUGINS is {os.environ.get('VLLM_PLUGINS')!r}: set VLLM_PLUGINS={PLUGIN_NAME}, "
            "or start the engine with `mta engine`"
        )
    from vllm.lora import worker_manager

    from server.engine_plugin.manager import FusingLoRAManager

    worker_manager.LRUCacheWorkerLoRAManager = FusingLoRAManager
    runner = sys.modules.get("vllm.v1.worker.lora_model_runner_mixin")
    if runner is not None:  # it binds the class by name when it is imported, which may be before us
        runner.LRUCacheWorkerLoRAManager = FusingLoRAManager  # type: ignore[attr-defined]
