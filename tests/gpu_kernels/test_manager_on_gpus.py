"""The adapter manager on GPUs, on vLLM's own caches without a model: what it holds of a user, and for how long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.request import LoRARequest

from adapters.fusion import fuse
from adapters.recipe import parse_recipe
from adapters.user_adapter import UserAdapter, encode_user_adapter, stack
from bank.errors import BankError
from server.engine.gpu.manager import GpuLoRAManager
from tests.gpu_kernels.test_slots_on_gpus import DTYPE, MODULES, ONE, ROUNDING, Slots, matrix_of, own_lora

PLAIN = f"mta3:{ONE}:shared:c+a01*500"
STACKED = f"{PLAIN}:u-{'a' * 25}e.{'a' * 25}e"


class BareManager(GpuLoRAManager):
    def __init__(self, *, sharded: bool = False) -> None:
        self._adapter_manager = Slots()
        self.metrics = self._adapter_manager.metrics
        self._users = {}
        self._vllm_names = {ONE: {m.name: m.name for m in MODULES}}
        self.lora_config = SimpleNamespace(lora_dtype=DTYPE)
        self._adapter_manager.lora_config.fully_sharded_loras = sharded
        self._adapter_manager.modules["qk"].tp_size += sharded
        manifest: Any = SimpleNamespace(short=ONE)
        self._matrices = {ONE: self._opened(manifest, matrix_of(ONE))}

    def serve(self, lora_id: int, name: str) -> None:
        self._apply_adapters({LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=name)})

    def slot(self, index: int) -> list[torch.Tensor]:
        """Return A and B of each module."""
        layer = self._adapter_manager.modules["qk"]
        return [stack[index, 0].cpu() for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked)]


def test_a_user_adapter_is_stacked_and_gone_when_it_is_released() -> None:
    manager, recipe, own = BareManager(), parse_recipe(PLAIN), UserAdapter(PLAIN, own_lora(1, 2))
    manager.hold(STACKED, encode_user_adapter(matrix_of(ONE).layout, own))
    manager.serve(1, PLAIN)
    manager.serve(2, STACKED)
    stacked = manager.slot(1)
    assert (manager.held(), manager.resident()) == ([STACKED], [PLAIN, STACKED])
    assert "mta_engine_fuse_seconds_count 2.0" in manager.metrics.text
    whole = stack(fuse(matrix_of(ONE), recipe, DTYPE), own, DTYPE)
    for m, a, b in zip(MODULES, stacked[:2], stacked[2:], strict=True):
        torch.testing.assert_close(a[:10], whole.a[m.name].bfloat16().to(DTYPE), rtol=2**-7, atol=0)
        torch.testing.assert_close(b[:, :10], whole.b[m.name], rtol=2**-7, atol=1e-4)
    manager.release([STACKED])
    assert (manager.held(), manager.resident()) == ([], [PLAIN])
    assert not any(matrix.any() for matrix in manager.slot(1))
    assert all(matrix.any() for matrix in manager.slot(0))


def test_where_vllm_must_write_rows_are_summed_on_the_host() -> None:
    by_vllm, by_us = BareManager(sharded=True), BareManager()
    for manager in (by_vllm, by_us):
        manager.serve(1, PLAIN)
    assert not by_vllm._adapter_manager.banks
    for theirs, ours in zip(by_vllm.slot(0), by_us.slot(0), strict=True):
        assert ours.any()
        torch.testing.assert_close(theirs, ours, rtol=ROUNDING, atol=1e-6)


def test_stages_of_a_model_are_refused() -> None:
    two: Any = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    with pytest.raises(BankError, match=r"--pipeline-parallel-size is 2: .* use --tensor-parallel-size 2"):
        BareManager().create_lora_manager(torch.nn.Module(), two)
