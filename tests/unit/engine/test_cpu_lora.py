"""LoRA on CPU, without a model: its kernels are compiled once, and give what dense products and exact sums give."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from adapters.fusion import fuse_flat
from adapters.lora import ModuleShape, RowLayout
from adapters.matrix import MetaMatrix
from adapters.recipe import PER_MILLE, parse_recipe
from bank.errors import BankError
from server.engine.cpu import lora, native
from server.engine.cpu.lora import CpuLoRA, SlotTable, transpose_b
from server.settings import Settings

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
    transpose_b(layer)
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
        table.update(slot, rank, ("bank", rank) if shares else None)
    wrapper = CpuLoRA(64, max_batches=64, device=torch.device("cpu"))
    wrapper.use_table(table)
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


HALF_A_PLACE = 2**-8 * 1.001
"""Of a bfloat16 number."""


@pytest.fixture(scope="module")
def compiled() -> Any:
    cache_dir = Settings().cache_dir
    assert native.build(cache_dir), "no C++ compiler: personal answers are slow here, and tests miss the kernel"
    return native.kernels(cache_dir)


def test_what_is_there_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(native, "_compile", lambda folder: pytest.fail("compiled again"))
    assert native.build(tmp_path)


def test_another_source_or_another_pytorch_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = native.library_path(tmp_path)
    monkeypatch.setattr(native, "version", lambda package: "0.0")
    other = native.library_path(tmp_path)
    monkeypatch.setattr(native, "SOURCES", native.SOURCES[:1])
    assert len({here, other, native.library_path(tmp_path)}) == 3


@pytest.mark.parametrize("reason", ["no compiler", "a compiler that fails"])
def test_without_it_the_reason_is_logged_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    def fail(folder: str) -> None:
        raise RuntimeError(f"Error building extension in {folder}")

    monkeypatch.setattr(native.shutil, "which", lambda name: None if reason == "no compiler" else f"/bin/{name}")
    monkeypatch.setattr(native, "_compile", fail)
    with caplog.at_level(logging.WARNING, "mta.engine"):
        assert not native.build(tmp_path)
    assert ("install g++" if reason == "no compiler" else "Error building extension") in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@settings(max_examples=60, deadline=None)
@given(
    rank=st.sampled_from([1, 3, 8, 16]),
    h_out=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    terms=st.sampled_from(["a00*1000", "a00*350+a02*650", "c", "c+a01*300", "c+a00*250+a01*250+a02*250"]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_exact_sum_rounded_once(compiled: Any, rank: int, h_out: list[int], terms: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = RowLayout(tuple(ModuleShape(f"m{i}", 4, h) for i, h in enumerate(h_out)), rank, shared_a=True)
    rows = torch.randn(4, layout.row_numbers, generator=generator).bfloat16()
    a = torch.randn(layout.a_numbers, generator=generator).bfloat16()
    matrix = MetaMatrix(layout, rows, anchors=3, common=True, shared_a=a)
    recipe = parse_recipe(f"mta3:9f2c41d0:shared:{terms}")

    ours = fuse_flat(matrix, recipe, sum_transposed=compiled.weighted_sum_transposed)

    shares = [(matrix.common_index, 1.0)] * recipe.common + [(t.anchor, t.weight / PER_MILLE) for t in recipe.terms]
    exact = sum(rows[row].double() * share for row, share in shares).view(-1, rank)
    assert ours.b.t().is_contiguous() and ours.transposed() is ours
    torch.testing.assert_close(ours.b.double(), exact, rtol=HALF_A_PLACE, atol=1e-6)
    torch.testing.assert_close(ours.b, fuse_flat(matrix, recipe).b, rtol=2 * HALF_A_PLACE, atol=1e-6)


def test_a_row_alone_comes_back_as_it_is_what_is_not_a_number_too(compiled: Any) -> None:
    rows = torch.tensor([[1.0, -2.0, float("inf"), float("nan"), 0.5, 3.0]]).bfloat16()
    summed = compiled.weighted_sum_transposed(rows, [0], [1.0], 2)
    torch.testing.assert_close(summed, rows.view(3, 2).t().contiguous(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("chosen, weights, rank", [([4], [1.0], 2), ([-1], [1.0], 2), ([], [], 2), ([0], [1.0], 4)])
def test_what_is_not_there_is_refused(compiled: Any, chosen: list[int], weights: list[float], rank: int) -> None:
    with pytest.raises(RuntimeError):
        compiled.weighted_sum_transposed(torch.zeros(4, 6).bfloat16(), chosen, weights, rank)
