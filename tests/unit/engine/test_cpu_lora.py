"""LoRA on CPU, without a model: its kernels are compiled once, and give what dense products and exact sums give."""

from __future__ import annotations

import base64
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from adapters.fusion import fuse_flat
from adapters.lora import ModuleShape, RowLayout
from adapters.matrix import PACK_BLOCK, MetaMatrix
from adapters.recipe import parse_recipe
from bank.errors import BankError
from server.engine.cpu import lora, native
from server.engine.cpu.lora import CpuLoRA, SlotTable
from server.engine.cpu.slots import transpose_b
from server.engine.fusing.slots import SlotContent
from server.settings import Settings

ROUNDING = 2**-8  # of a bfloat16 number: half a unit in its last place, and some more for what went before


@dataclass(frozen=True)
class Step:
    owners: tuple[int, ...]  # of each row the adapter's slot, -1 for none
    tenants: tuple[tuple[int, bool], ...]  # of each slot the tenant's rank, and whether its A is the shared one
    slot_rank: int  # the cells above a tenant's rank hold what an earlier tenant left
    h_in: int
    h_out: tuple[int, ...]  # of each module of the layer
    padding: int = 0  # rows beyond those that vLLM speaks of
    prefill: bool = True  # what vLLM calls the step
    dtype: torch.dtype = torch.float32
    compiled: bool = True  # whether the compiled kernel may serve
    seed: int = 0


@st.composite
def steps(draw: st.DrawFn) -> Step:
    slot_rank = draw(st.sampled_from([1, 8, 16, 32]))
    tenants = draw(st.lists(st.tuples(st.integers(1, slot_rank), st.booleans()), min_size=1, max_size=6))
    return Step(
        owners=tuple(draw(st.lists(st.integers(-1, len(tenants) - 1), min_size=1, max_size=40))),
        tenants=tuple(tenants),
        slot_rank=slot_rank,
        h_in=draw(st.sampled_from([1, 7, 16, 33, 64, 100])),
        h_out=tuple(draw(st.lists(st.sampled_from([1, 5, 16, 31, 32, 48, 70]), min_size=1, max_size=3))),
        padding=draw(st.integers(0, 3)),
        prefill=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        compiled=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def layer_of(step: Step) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A and B of a layer whose slots hold numbers everywhere, above the tenants' ranks too."""
    numbers, slots = torch.Generator().manual_seed(step.seed), len(step.tenants)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers).to(step.dtype)

    layer = SimpleNamespace(lora_b_stacked=tuple(random(slots, 1, size, step.slot_rank) for size in step.h_out))
    values = layer.lora_b_stacked
    transpose_b(layer)
    for b, value in zip(layer.lora_b_stacked, values, strict=True):
        b.copy_(value)
    stacked_a = tuple(random(slots, 1, step.slot_rank, step.h_in) for _ in step.h_out)
    for a in stacked_a:
        a[torch.tensor([shares for _, shares in step.tenants]), 0] = random(step.slot_rank, step.h_in)
    return stacked_a, layer.lora_b_stacked


def wrapper_of(step: Step) -> CpuLoRA:
    slots = len(step.tenants)
    wrapper = CpuLoRA(1024, max_batches=64, device=torch.device("cpu"))
    contents = [SlotContent(rank, shared_a_key=f"{rank}" if shares else None) for rank, shares in step.tenants]
    wrapper.table = SlotTable(contents)
    if not step.compiled:
        wrapper._kernel = None
    ids = tuple(slots - owner if owner >= 0 else 0 for owner in step.owners)  # slot 0 has the highest id
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=step.prefill), list(range(slots, 0, -1)), slots + 1, 32)
    return wrapper


@settings(max_examples=150)
@given(steps())
def test_each_row_gets_the_dense_product_of_its_own_adapter(step: Step) -> None:
    stacked_a, stacked_b = layer_of(step)
    numbers = torch.Generator().manual_seed(step.seed + 1)
    rows = len(step.owners) + step.padding
    x = torch.randn(rows, step.h_in, generator=numbers).to(step.dtype)
    before = torch.randn(rows, sum(step.h_out), generator=numbers).to(step.dtype)
    y, logits = before.clone(), before[:, : step.h_out[0]].clone()
    wrapper = wrapper_of(step)
    wrapper.add_lora_linear(y, x, stacked_a, stacked_b, 1.0, step.h_out)
    wrapper.add_lora_logits(logits, x, stacked_a[0], stacked_b[0], 1.0)
    for row in range(rows):
        slot = step.owners[row] if row < len(step.owners) else -1
        if slot < 0:
            assert torch.equal(y[row], before[row]) and torch.equal(logits[row], before[row, : step.h_out[0]])
            continue
        rank, _ = step.tenants[slot]
        pairs = zip(stacked_a, stacked_b, strict=True)
        halves = [(a[slot, 0, :rank].double(), b[slot, 0, :, :rank].double()) for a, b in pairs]
        added = torch.cat([b @ (a @ x[row].double()) for a, b in halves])
        # What errors are relative to.
        terms = torch.cat([b.abs() @ (a.abs() @ x[row].double().abs()) for a, b in halves])
        wanted = before[row].double() + added
        loose = 0 if step.dtype == torch.float32 else ROUNDING
        for made, compiled in ((y[row], step.compiled), (logits[row], False)):
            within = loose / 64 if compiled else 2 * loose  # PyTorch rounds what lies between A and B as well
            allowed = loose * wanted.abs() + (within + 1e-5) * terms + 1e-5
            assert ((made.double() - wanted[: len(made)]).abs() <= allowed[: len(made)]).all()


def test_nan_does_not_spread_and_no_adapter_adds_nothing() -> None:
    step = Step((0, 1, -1, 0), ((2, False), (2, False)), 8, 32, (32, 5), dtype=torch.bfloat16)
    layer, wrapper = layer_of(step), wrapper_of(step)
    fresh = CpuLoRA(64, max_batches=64, device=torch.device("cpu"))  # before any step
    x, y, unchanged = torch.ones(4, 32).bfloat16(), torch.zeros(4, 37).bfloat16(), torch.zeros(4, 37).bfloat16()
    x[0, 3] = torch.nan
    wrapper.add_lora_linear(y, x, *layer, 1.0, step.h_out)
    assert y[0].isnan().all()
    assert y[1].isfinite().all() and y[3].isfinite().all() and not y[2].any()
    wrapper.update_metadata(LoRAMapping((0,) * 4, (0,) * 4, is_prefill=True), [2, 1], 3, 32)
    for without in (fresh, wrapper):
        without.add_lora_linear(unchanged, x, *layer, 1.0, step.h_out)
        assert not unchanged.any()


@pytest.mark.parametrize(
    ("rows", "outputs", "refused"),
    [(999, 48, "up to row 999, x has 999 rows"), (1000, 47, "B has more outputs than y"), (1000, 48, None)],
)
def test_a_layer_without_a_steps_rows_or_outputs_is_refused(rows: int, outputs: int, refused: str | None) -> None:
    step = Step((0, *[-1] * 998, 0), ((8, False),), 8, 64, (16, 32), dtype=torch.bfloat16)
    x, y = torch.ones(rows, 64).bfloat16(), torch.zeros(rows, outputs).bfloat16()
    with pytest.raises(RuntimeError, match=refused) if refused else nullcontext():
        wrapper_of(step).add_lora_linear(y, x, *layer_of(step), 1.0, step.h_out)


def test_vllm_with_an_unknown_operation_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PunicaWrapperCPU, "add_lora_convolution", lambda self: None, raising=False)
    with pytest.raises(BankError, match=r"has \['add_lora_convolution'\]"):
        lora.install()


@pytest.fixture(scope="module")
def compiled() -> Any:
    cache_dir = Settings().cache_dir
    assert native.build(cache_dir), "no C++ compiler: personal answers are slow here, and tests miss the kernel"
    return native.kernels(cache_dir)


def test_only_another_source_or_pytorch_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {here := native.library_path(tmp_path)}
    here.parent.mkdir(parents=True)
    here.touch()
    monkeypatch.setattr(native, "_compile", lambda folder: pytest.fail("compiled again"))
    assert native.build(tmp_path)
    monkeypatch.setattr(native, "version", lambda package: "0.0")
    paths.add(native.library_path(tmp_path))
    monkeypatch.setattr(native, "SOURCES", native.SOURCES[:1])
    assert len(paths | {native.library_path(tmp_path)}) == 3


@pytest.mark.parametrize("reason", ["no compiler", "a compiler that fails"])
def test_without_it_the_reason_is_logged_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name, **_: None if reason == "no compiler" else f"/bin/{name}")
    monkeypatch.setattr(native, "_compile", MagicMock(side_effect=RuntimeError("Error building extension")))
    monkeypatch.setattr(native.log, "handlers", [caplog.handler])  # vLLM's loggers stop before the root
    assert not native.build(tmp_path)
    assert ("install g++" if reason == "no compiler" else "Error building extension") in caplog.text
    assert not list(tmp_path.rglob("*.so"))


STEPS = "c~" + base64.urlsafe_b64encode(bytes(step & 0xFF for step in range(-9, 10))).decode().rstrip("=")


@settings(max_examples=60)
@given(
    rank=st.sampled_from([1, 3, 8, 16]),
    h_out=st.lists(st.integers(1, 200) | st.just(2100), min_size=1, max_size=3),
    terms=st.sampled_from(["a00*1000", "a00*350+a02*650", "c", "c+a01*300", "c+a00*250+a01*250+a18*250", STEPS]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_exact_sum_rounded_once(compiled: Any, rank: int, h_out: list[int], terms: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = RowLayout(tuple(ModuleShape(f"m{i}", 4, h) for i, h in enumerate(h_out)), rank, shared_a=True)
    rows = torch.randn(20, layout.row_numbers, generator=generator).bfloat16()
    a = torch.randn(layout.a_numbers, generator=generator).bfloat16()
    matrix = MetaMatrix(layout, rows, anchors=19, common=True, shared_a=a)
    recipe = parse_recipe(f"mta3:9f2c41d0:shared:{terms}")

    ours = fuse_flat(matrix, recipe, sum_transposed=compiled.weighted_sum_transposed)

    exact = sum(rows[row].double() * share for row, share in recipe.rows(matrix.common_index)).view(-1, rank)
    assert ours.b.t().is_contiguous() and ours.transposed() is ours
    torch.testing.assert_close(ours.b.double(), exact, rtol=1.001 * ROUNDING, atol=1e-6)
    torch.testing.assert_close(ours.b, fuse_flat(matrix, recipe).b, rtol=2.002 * ROUNDING, atol=1e-6)


@settings(max_examples=40)
@given(rank=st.sampled_from([1, 3, 8]), h_out=st.integers(1, 700) | st.just(2100), seed=st.integers(0, 1000))
def test_int8_rows_sum_as_stored_and_common_row_exactly(compiled: Any, rank: int, h_out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = RowLayout((ModuleShape("m", 4, h_out),), rank, shared_a=True)
    rows = torch.randn(20, layout.row_numbers, generator=generator).bfloat16()
    rows[3] = 0
    a = torch.randn(layout.a_numbers, generator=generator).bfloat16()
    matrix = MetaMatrix(layout, rows, anchors=19, common=True, shared_a=a).with_packed()
    assert matrix.packed is not None
    numbers, scales = matrix.packed
    scale = scales.repeat_interleave(PACK_BLOCK, dim=1)[:, : rows.shape[1]]
    read = torch.cat([numbers.double() * scale.double(), rows[19:].double()])
    assert ((read - rows.double()).abs()[:19] <= 0.501 * scale).all()
    recipe = parse_recipe(f"mta3:9f2c41d0:shared:{STEPS}")
    summed = fuse_flat(matrix, recipe, sum_transposed=compiled.weighted_sum_transposed).b.double()
    shares = torch.zeros(20, dtype=torch.float64)
    for row, share in recipe.rows(matrix.common_index):
        shares[row] += share
    torch.testing.assert_close(summed, (shares @ read).view(-1, rank), rtol=1.001 * ROUNDING, atol=1e-5)
    for wrong in (
        (numbers[:, 1:], scales),
        (numbers.short(), scales),
        (numbers, scales[1:]),
        (numbers, scales.double()),
    ):
        with pytest.raises(RuntimeError, match="must be"):
            compiled.weighted_sum_transposed(rows, [0], [1.0], rank, *wrong)


def test_single_row_comes_back_as_it_is_and_absent_is_refused(
    compiled: Any,
) -> None:
    rows = torch.tensor([[1.0, -2.0, float("inf"), float("nan"), 0.5, 3.0]]).bfloat16()
    summed = compiled.weighted_sum_transposed(rows, [0], [1.0], 2)
    torch.testing.assert_close(summed, rows.view(3, 2).t().contiguous(), equal_nan=True, rtol=0, atol=0)
    for absent in (([1], [1.0], 2), ([-1], [1.0], 2), ([], [], 2), ([0], [1.0], 4)):
        with pytest.raises(RuntimeError):
            compiled.weighted_sum_transposed(rows, *absent)
