"""LoRA on CPU against the dense product of each row's own adapter, over steps of every make-up, without a model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from bank.errors import BankError
from server.engine.cpu import lora
from server.engine.cpu.lora import CpuLoRA, SlotTable, lay_b_across

ROUNDING = 2**-8
"""Of a bfloat16 number: half a unit in its last place, and some more for what went before."""


@dataclass(frozen=True)
class Step:
    """A step through one layer."""

    owners: tuple[int, ...]  # of each row the adapter's slot, -1 for none
    ranks: tuple[int, ...]  # of each slot's tenant; the cells of a slot above it hold what an earlier tenant left
    shares_a: tuple[bool, ...]  # of each slot, whether its A is the one that tenants share
    slot_rank: int
    h_in: int
    h_out: tuple[int, ...]  # of each module of the layer
    padding: int  # rows beyond those that vLLM speaks of
    prefill: bool  # what vLLM calls the step
    dtype: torch.dtype
    compiled: bool  # whether the compiled kernel may serve
    seed: int


@st.composite
def steps(draw: st.DrawFn) -> Step:
    slot_rank = draw(st.sampled_from([1, 8, 16, 32]))
    slots = draw(st.integers(1, 6))
    each = {"min_size": slots, "max_size": slots}
    return Step(
        owners=tuple(draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=40))),
        ranks=tuple(draw(st.lists(st.integers(1, slot_rank), **each))),
        shares_a=tuple(draw(st.lists(st.booleans(), **each))),
        slot_rank=slot_rank,
        h_in=draw(st.sampled_from([1, 7, 16, 33, 64, 100])),
        h_out=tuple(draw(st.lists(st.sampled_from([1, 5, 16, 31, 32, 48, 70]), min_size=1, max_size=3))),
        padding=draw(st.integers(0, 3)),
        prefill=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        compiled=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass
class Layer:
    """What `CpuLoRA` reads of a layer."""

    lora_a_stacked: tuple[torch.Tensor, ...]
    lora_b_stacked: tuple[torch.Tensor, ...]


def layer_of(step: Step) -> Layer:
    """A layer whose slots hold numbers everywhere, above the tenants' ranks too."""
    numbers = torch.Generator().manual_seed(step.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers).to(step.dtype)

    slots = len(step.ranks)
    layer = Layer(
        tuple(random(slots, 1, step.slot_rank, step.h_in) for _ in step.h_out),
        tuple(torch.zeros(slots, 1, size, step.slot_rank, dtype=step.dtype) for size in step.h_out),
    )
    lay_b_across(layer)
    for b in layer.lora_b_stacked:
        b.copy_(random(*b.shape))
    for a in layer.lora_a_stacked:
        shared = random(step.slot_rank, step.h_in)
        for slot, shares in enumerate(step.shares_a):
            if shares:
                a[slot, 0] = shared
    return layer


def wrapper_of(step: Step) -> CpuLoRA:
    """In that step; the adapter in slot 0 has the highest id."""
    slots = len(step.ranks)
    table = SlotTable(slots)
    for slot, (rank, shares) in enumerate(zip(step.ranks, step.shares_a, strict=True)):
        table.note(slot, rank, ("bank", rank) if shares else None)
    wrapper = CpuLoRA(64, max_batches=64, device=torch.device("cpu"))
    wrapper.watch(table)
    if not step.compiled:
        wrapper._kernel = None
    ids = tuple(slots - owner if owner >= 0 else 0 for owner in step.owners)
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=step.prefill), list(range(slots, 0, -1)), slots + 1, 32)
    return wrapper


@settings(max_examples=300, deadline=None)
@given(steps())
def test_each_row_gets_the_dense_product_of_its_own_adapter(step: Step) -> None:
    layer = layer_of(step)
    numbers = torch.Generator().manual_seed(step.seed + 1)
    rows = len(step.owners) + step.padding
    x = torch.randn(rows, step.h_in, generator=numbers).to(step.dtype)
    before = torch.randn(rows, sum(step.h_out), generator=numbers).to(step.dtype)
    y = before.clone()
    wrapper_of(step).add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, step.h_out)
    for row in range(rows):
        slot = step.owners[row] if row < len(step.owners) else -1
        if slot < 0:
            assert torch.equal(y[row], before[row])
            continue
        rank = step.ranks[slot]
        pairs = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
        halves = [(a[slot, 0, :rank].double(), b[slot, 0, :, :rank].double()) for a, b in pairs]
        added = torch.cat([b @ (a @ x[row].double()) for a, b in halves])
        # What errors are relative to.
        terms = torch.cat([b.abs() @ (a.abs() @ x[row].double().abs()) for a, b in halves])
        wanted = before[row].double() + added
        loose = 0 if step.dtype == torch.float32 else ROUNDING
        within = loose / 64 if step.compiled else 2 * loose  # PyTorch rounds what lies between A and B as well
        allowed = loose * wanted.abs() + (within + 1e-5) * terms + 1e-5
        assert ((y[row].double() - wanted).abs() <= allowed).all()


def test_numbers_that_are_none_stay_so_and_do_not_spread() -> None:
    step = Step((0, 1, -1, 0), (2, 2), (False, False), 8, 32, (32, 5), 0, True, torch.bfloat16, True, 0)
    layer = layer_of(step)
    x, y = torch.ones(4, 32, dtype=torch.bfloat16), torch.zeros(4, 37, dtype=torch.bfloat16)
    x[0, 3] = torch.nan
    wrapper_of(step).add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, step.h_out)
    assert y[0].isnan().all()
    assert y[1].isfinite().all() and y[3].isfinite().all() and not y[2].any()


def test_before_any_step_and_in_one_without_adapters_nothing_is_added() -> None:
    step = Step((0, 1, 1), (2, 2), (False, False), 8, 32, (32, 5), 0, True, torch.float32, True, 0)
    layer = layer_of(step)
    fresh, after = CpuLoRA(64, max_batches=64, device=torch.device("cpu")), wrapper_of(step)
    after.update_metadata(LoRAMapping((0, 0, 0), (0, 0, 0), is_prefill=True), [2, 1], 3, 32)
    for wrapper in (fresh, after):
        y = torch.zeros(3, 37)
        wrapper.add_lora_linear(y, torch.ones(3, 32), layer.lora_a_stacked, layer.lora_b_stacked, 1.0, step.h_out)
        assert not y.any()


def test_logits_get_their_own_adapter_and_rows_without_one_nothing() -> None:
    step = Step((-1, 0, -1, 1, -1), (3, 3), (False, False), 3, 4, (6,), 0, True, torch.float32, False, 0)
    layer = layer_of(step)
    (a,), (b,) = layer.lora_a_stacked, layer.lora_b_stacked
    numbers = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, width, generator=numbers) for width in (4, 6))
    expected = y.clone()
    for row, slot in enumerate(step.owners):
        if slot >= 0:
            expected[row] += b[slot, 0] @ (a[slot, 0] @ x[row])
    wrapper_of(step).add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y, expected)


def test_a_vllm_with_an_operation_that_nobody_knows_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PunicaWrapperCPU, "add_lora_convolution", lambda self: None, raising=False)
    with pytest.raises(BankError, match=r"has \['add_lora_convolution'\]"):
        lora.install()
