"""`--worker-extension-cls`: methods that the API process calls on every worker through `collective_rpc`."""

from __future__ import annotations

from typing import Any

from server.engine.fusing.figures import Reading
from server.engine.fusing.manager import FusingLoRAManager


class WorkerExtension:
    """Mixed into vLLM's worker class; names are prefixed so that they clash with nothing there."""

    model_runner: Any

    def mta_resident(self) -> list[str]:
        """The recipes this worker holds, least recently used first."""
        return self._mta_manager().resident()

    def mta_held(self) -> list[str]:
        """The stacked recipes whose user adapter this worker still holds in some form, sorted."""
        return sorted(self._mta_manager().held())

    def mta_figures(self) -> tuple[dict[str, Reading], dict[str, int]]:
        """What this worker has measured: durations and counts."""
        manager = self._mta_manager()
        durations, counts = manager.figures.readings()
        return durations, counts | {"slots_taken": manager.slots_taken}

    def mta_hold(self, name: str, raw: bytes) -> None:
        """Keep the user adapter that a recipe names; it has been checked."""
        self._mta_manager().hold(name, raw)

    def mta_release(self, names: list[str]) -> None:
        """Forget the user adapters of some recipes, and what was fused with them."""
        self._mta_manager().release(names)

    def _mta_manager(self) -> FusingLoRAManager:
        """Raises RuntimeError when vLLM does not use our adapter manager: no recipe could be fused."""
        manager = self.model_runner.lora_manager
        if not isinstance(manager, FusingLoRAManager):
            raise RuntimeError(f"the worker's adapter manager is {type(manager).__name__}, not FusingLoRAManager")
        return manager
