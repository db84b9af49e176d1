"""LoRA on CPU in steps that mix rows with and without an adapter, on vLLM's own operators without a model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from bank.errors import BankError
from server.engine.fusing.kernels import check
from server.engine.fusing.kernels.check import check_wrapper
from server.engine.fusing.kernels.wrapper import CpuLoRA

HIDDEN, RANK, OUT, SLOTS = 8, 4, (6, 2), 2


def wrapper_for(*owners: int, prefill: bool = True) -> CpuLoRA:
    """In a step of rows whose adapters have these ids, where 0 is none; adapter 1 lies in slot 1, 2 in slot 0."""
    wrapper = CpuLoRA(16, max_batches=16, device=torch.device("cpu"))
    wrapper.update_metadata(LoRAMapping(owners, owners, is_prefill=prefill), [2, 1], SLOTS + 1, 32)
    return wrapper


@pytest.fixture
def weights() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A and B of a layer of two slices, in all slots."""
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, HIDDEN) for _ in OUT)
    return a, tuple(torch.randn(SLOTS, 1, size, RANK) for size in OUT)


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("owners", [(0,), (0, 0, 0), (1,), (1, 2, 2), (0, 1, 1, 0, 2), (0, 0, 0, 1), (2, 0)])
def test_each_row_gets_its_own_adapter_and_none_gets_nothing(
    weights: Any, owners: tuple[int, ...], prefill: bool
) -> None:
    a, b = weights
    x, before = torch.randn(len(owners), HIDDEN), torch.randn(len(owners), sum(OUT))
    y = before.clone()
    wrapper_for(*owners, prefill=prefill).add_lora_linear(y, x, a, b, 1.0, OUT)
    for row, owner in enumerate(owners):
        if owner == 0:
            assert torch.equal(y[row], before[row])
            continue
        slot = [2, 1].index(owner)
        added = torch.cat([b[i][slot, 0] @ a[i][slot, 0] @ x[row] for i in range(len(OUT))])
        torch.testing.assert_close(y[row], before[row] + added)


def test_a_step_forgets_the_rows_of_the_one_before(weights: Any) -> None:
    a, b = weights
    wrapper = wrapper_for(1, 1, 1)
    wrapper.update_metadata(LoRAMapping((0, 0), (0, 0), is_prefill=True), [2, 1], SLOTS + 1, 32)
    x, y = torch.randn(2, HIDDEN), torch.zeros(2, sum(OUT))
    wrapper.add_lora_linear(y, x, a, b, 1.0, OUT)
    assert not y.any()


def test_before_any_step_nothing_is_added(weights: Any) -> None:
    y = torch.zeros(3, sum(OUT))
    fresh = CpuLoRA(16, max_batches=16, device=torch.device("cpu"))
    fresh.add_lora_linear(y, torch.randn(3, HIDDEN), *weights, 1.0, OUT)
    assert not y.any()


def test_a_wrapper_that_mixes_rows_up_is_refused_at_start() -> None:
    check_wrapper()
    with pytest.raises(BankError, match=r"add_lora_linear, add_lora_embedding, add_lora_logits .* must not serve"):
        check_wrapper(PunicaWrapperCPU)


def test_a_wrapper_of_another_shape_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(CpuLoRA):
        def add_lora_linear(self, y: torch.Tensor) -> None:
            """Another signature."""

    with pytest.raises(BankError, match="not the ones the plugin knows"):
        check_wrapper(Changed)
    monkeypatch.setattr(check.PunicaWrapperCPU, "add_lora_convolution", lambda self: None, raising=False)
    with pytest.raises(BankError, match=r"differs in \['add_lora_convolution'\]"):
        check_wrapper()
