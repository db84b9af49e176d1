"""The adapter manager on GPUs: a step that needs a recipe sums its rows on the device, straight into the slot."""

from __future__ import annotations

from adapters.matrix import MetaMatrix
from adapters.recipe import parse_recipe
from adapters.user_adapter import decode_user_adapter
from bank.manifest import BankManifest
from server.engine.fusing.manager import FusingLoRAManager
from server.engine.fusing.metrics import timed
from server.engine.fusing.slots import FusedLoRAModel
from server.engine.gpu.slots import DeviceSlots, SummedLoRAModel


class GpuLoRAManager(FusingLoRAManager):
    """Sums on the device; on the host only for layers whose adapters vLLM must write."""

    _manager_cls = DeviceSlots
    _adapter_manager: DeviceSlots

    def _opened(self, manifest: BankManifest, matrix: MetaMatrix) -> MetaMatrix:
        self._adapter_manager.open_bank(manifest.short, matrix, self._vllm_names[manifest.short])
        if bank := self._adapter_manager.banks.get(manifest.short):
            bank.zero(0, 0)  # compiles the kernel while no slot is in use
        return matrix

    def _model(self, lora_id: int, name: str) -> FusedLoRAModel:
        recipe = parse_recipe(name)
        if recipe.bank not in self._adapter_manager.banks:
            with timed(self.metrics.fuse):
                return self._model_of(lora_id, name, self._flat(name))
        matrix = self._matrices[recipe.bank]
        own = decode_user_adapter(matrix.layout, self._users[name]).weights if recipe.user_adapter else None
        return SummedLoRAModel(lora_id, recipe, matrix, own)
