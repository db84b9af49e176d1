"""Operators on CPU, without a model: linear layers with adapters, and norms, give what PyTorch gives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from server.engine.cpu import native, operators
from server.engine.cpu.operators import FEW, LANES, pack
from server.settings import Settings
from tests.unit.engine.test_cpu_lora import ROUNDING, Step, layer_of, wrapper_of


@pytest.fixture(scope="module", autouse=True)
def linear() -> Any:
    """The compiled operator, on whatever processor."""
    cache_dir = Settings().cache_dir
    assert native.build(cache_dir), "no C++ compiler: personal answers are slow here, and tests miss the kernel"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(operators, "linear", lambda: native.kernels(cache_dir).linear.default)
        yield operators.linear()


@st.composite
def steps(draw: st.DrawFn) -> Step:
    tenants = draw(st.lists(st.tuples(st.integers(1, 16), st.booleans()), min_size=1, max_size=4))
    h_out = draw(st.lists(st.sampled_from([3, 16, 24, 64, 100]), max_size=2))
    return Step(
        owners=tuple(draw(st.lists(st.integers(-1, len(tenants) - 1), min_size=1, max_size=FEW))),
        tenants=tuple(tenants),
        slot_rank=16,
        h_in=draw(st.sampled_from([2, 16, 34, 96])),
        h_out=(*h_out, LANES * draw(st.integers(1, 9)) + -sum(h_out) % LANES),
        dtype=torch.bfloat16,
        seed=draw(st.integers(0, 2**16)),
    )


def layer_with(step: Step) -> tuple[Any, Any, torch.Tensor]:
    """A layer as vLLM has it with adapters, its base layer, and its weights."""
    base = torch.nn.Module()
    base.weight = torch.nn.Parameter(random(step, sum(step.h_out), step.h_in), requires_grad=False)
    weight, (stacked_a, stacked_b) = base.weight.data, layer_of(step)
    operators.with_packed_weights(lambda layer, remove_weight: pytest.fail("could be packed"))(base, True)
    assert base.weight.numel() == 0
    layer = SimpleNamespace(
        base_layer=base, punica_wrapper=wrapper_of(step), lora_a_stacked=stacked_a, lora_b_stacked=stacked_b
    )
    return layer, base, weight


def random(step: Step, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step.seed + sum(shape))).bfloat16()


@settings(max_examples=150)
@given(step=steps(), biased=st.booleans())
def test_a_layer_and_its_adapters_are_one_exact_sum_rounded_once(step: Step, biased: bool) -> None:
    bias = random(step, sum(step.h_out)) if biased else None
    layer, _, weight = layer_with(step)
    x = random(step, len(step.owners), step.h_in)
    apply = operators.with_adapters_in_one_call(lambda self, x, bias: self.base_layer.cpu_linear(x, None, bias))
    made = apply(layer, x, bias).double()
    wide, deep = x.double(), weight.double()
    wanted, terms = wide @ deep.t(), wide.abs() @ deep.abs().t()
    for row, slot in enumerate(step.owners):
        rank = step.tenants[slot][0]
        for first, a, b in zip(_starts(step), layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            if slot >= 0:
                part = slice(first, first + b.shape[2])
                low = a[slot, 0, :rank].double(), b[slot, 0, :, :rank].double()
                wanted[row, part] += low[1] @ (low[0] @ wide[row])
                terms[row, part] += low[1].abs() @ (low[0].abs() @ wide[row].abs())
    if bias is not None:
        wanted, terms = wanted + bias.double(), terms + bias.double().abs()
    assert ((made - wanted).abs() <= ROUNDING * wanted.abs() + 1e-5 * terms + 1e-5).all()


def _starts(step: Step) -> list[int]:
    return [sum(step.h_out[:module]) for module in range(len(step.h_out))]


@pytest.mark.parametrize("rows", [FEW + 1, 2 * FEW])
def test_many_rows_compute_the_layer_and_leave_lora_to_vllm(rows: int) -> None:
    step = Step(owners=(0,) * rows, tenants=((8, False),), slot_rank=8, h_in=64, h_out=(144,), dtype=torch.bfloat16)
    layer, base, weight = layer_with(step)
    x, vllms = random(step, rows, 64), MagicMock()
    assert operators.with_adapters_in_one_call(vllms)(layer, x, None) is vllms.return_value
    assert base.cpu_linear(x[:0], None, None).shape == (0, 144)
    made = base.cpu_linear(x[None], None, None)
    assert made.shape == (1, rows, 144)
    torch.testing.assert_close(made[0].double(), x.double() @ weight.double().t(), rtol=ROUNDING, atol=1e-3)


def test_rows_beside_each_other_do_not_change_each_other() -> None:
    step = Step(
        owners=(-1, 0, 1), tenants=((8, False), (4, False)), slot_rank=8, h_in=64, h_out=(160,), dtype=torch.bfloat16
    )
    layer, _, _ = layer_with(step)
    apply = operators.with_adapters_in_one_call(lambda self, x, bias: self.base_layer.cpu_linear(x, None, bias))
    x = random(step, 3, 64)
    together = apply(layer, x)
    for row, owner in enumerate(step.owners):
        layer.punica_wrapper = wrapper_of(replace(step, owners=(owner,)))
        assert torch.equal(apply(layer, x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("weight", [torch.ones(24, 16).bfloat16(), torch.ones(16, 3).bfloat16(), torch.ones(16, 16)])
def test_what_cannot_be_packed_stays_as_vllm_has_it(weight: torch.Tensor) -> None:
    layer, vllms = SimpleNamespace(weight=weight), MagicMock()
    operators.with_packed_weights(vllms)(layer, True)
    vllms.assert_called_once_with(layer, True)
    assert layer.weight is weight


def test_the_operator_refuses_what_does_not_fit(linear: Any) -> None:
    none, x, w = operators._NO_ROWS, torch.ones(2, 16).bfloat16(), pack(torch.ones(32, 16).bfloat16())
    rows = (*(torch.zeros(1, dtype=torch.int32) for _ in range(4)), 1)
    a, b = torch.zeros(1, 1, 8, 16).bfloat16(), torch.zeros(1, 1, 8, 16).bfloat16().transpose(2, 3)
    for wrong, why in (
        ((x[:, 1:], w, None, [], [], *none), "x must be"),
        ((x, w[0], None, [], [], *none), "w must be"),
        ((x, w, torch.ones(31).bfloat16(), [], [], *none), "bias must be"),
        ((x, w, None, [a], [b], *rows), "A and B must fit w"),
        ((x, w, None, [a], [b], *rows[:4], 3), "adapters up to row 2, x has 2 rows"),
        ((torch.ones(FEW + 1, 16).bfloat16(), w, None, [a], [b], *rows), "at most 32 rows"),
    ):
        with pytest.raises(RuntimeError, match=why):
            linear(*wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_vllms_own_in_one_call(dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, 96, generator=numbers).to(dtype) for _ in range(2))
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(96, dtype=dtype)
    norm.weight.data.copy_(torch.rand(96, generator=numbers))
    close = {"rtol": 2 * ROUNDING, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    unused = MagicMock()
    one = operators.with_one_norm(unused)
    torch.testing.assert_close(one(norm, x), norm.forward_native(x), **close)
    wanted = norm.forward_native(x.clone(), residual.clone())
    for made, native_one in zip(one(norm, x.clone(), residual.clone()), wanted, strict=True):
        torch.testing.assert_close(made, native_one, **close)
    unused.assert_not_called()
    assert one(norm, x[:, ::2], None) is unused.return_value
