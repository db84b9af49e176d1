"""Our kernel writes recipes into slots, from which vLLM's kernels for GPUs read what each adapter adds.

In float16, since Triton's interpreter does not know bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA

from adapters.fusion import fuse
from adapters.lora import LoraWeights, ModuleShape, RowLayout
from adapters.matrix import MetaMatrix
from adapters.recipe import parse_recipe
from adapters.user_adapter import UserAdapter, stack
from bank.errors import BankError
from server.engine.gpu.slots import DeviceBank, DeviceSlots, SummedLoRAModel
from tests.unit.engine.test_slots import SLOTS, bare_layer, make_bare

MODULES = tuple(ModuleShape(name, 40, h_out) for name, h_out in (("q", 48), ("k", 16)))
DTYPE, ROUNDING = torch.float16, 2**-10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE, OTHER, CAT = "1" * 8, "2" * 8, "3" * 8  # banks
RANKS = {ONE: 8, OTHER: 4, CAT: 8}
RECIPES = {1: "c+a00*700+a02*-200", 2: "c+a01*1000", 3: "c+a00*-300+a01*300+a02*300", 4: "c"}
MIXED = (0, 1, 1, -1, 0, 1, -1, 0, 0)  # the slots of a step's rows, of which two have no adapter


def matrix_of(bank: str, modules: Sequence[ModuleShape] = MODULES) -> MetaMatrix:
    """Three anchors and a common row of random numbers."""
    layout = RowLayout(tuple(modules), RANKS[bank], shared_a=bank != CAT)
    numbers = torch.Generator().manual_seed(int(bank))
    rows = torch.randn(4, layout.row_numbers, generator=numbers) / 8
    frozen = torch.randn(layout.a_numbers, generator=numbers).to(DTYPE) if layout.shared_a else None
    return MetaMatrix(layout, rows.to(DTYPE), 3, True, frozen)


def give_slots(layer: Any, widths: Sequence[tuple[int, int]], room: int) -> None:
    empty = partial(torch.zeros, dtype=DTYPE, device=DEVICE)
    layer.lora_a_stacked = tuple(empty(SLOTS, 1, room, h_in) for h_in, _ in widths)
    layer.lora_b_stacked = tuple(empty(SLOTS, 1, h_out, room) for _, h_out in widths)


class Slots(DeviceSlots):
    """Of one layer, which has two modules."""

    def __init__(self, room: int = 16) -> None:
        layer = bare_layer(MergedColumnParallelLinearWithLoRA, len(MODULES))
        layer.tp_size = 1
        give_slots(layer, [(m.h_in, m.h_out) for m in MODULES], room)
        make_bare(self, {"qk": layer}, {"qk": [m.name for m in MODULES]})
        self.served = 0

    def bring_in(self, number: int, own: int = 0, bank: str = ONE) -> LoraWeights:
        """Serve a recipe, perhaps with a user's adapter of a rank, and return what it is made of."""
        self.served += 1
        matrix = matrix_of(bank)
        if bank not in self.banks:
            self.open_bank(bank, matrix, {m.name: m.name for m in MODULES})
        recipe = parse_recipe(f"mta3:{bank}:{'cat' if bank == CAT else 'shared'}:{RECIPES[number]}")
        theirs = own_lora(self.served, own) if own else None
        self.add_adapter(SummedLoRAModel(self.served, recipe, matrix, theirs))
        self.activate_adapter(self.served)
        fused = fuse(matrix, recipe, DTYPE)
        return stack(fused, UserAdapter(recipe.name, theirs), DTYPE) if theirs else fused


def own_lora(seed: int, rank: int) -> LoraWeights:
    numbers = torch.Generator().manual_seed(seed)
    a = {m.name: torch.randn(rank, m.h_in, generator=numbers).to(DTYPE) for m in MODULES}
    b = {m.name: (torch.randn(m.h_out, rank, generator=numbers) / 8).to(DTYPE) for m in MODULES}
    return LoraWeights(rank, a, b)


def adapted(slots: Slots, x: torch.Tensor, owners: Sequence[int], *, specialised: bool) -> torch.Tensor:
    """Return what vLLM's kernels add to the layer's output for rows x [N, H_in], [N, sum of H_out].

    `owners` has each row's slot, -1 for none. If `specialised`, kernels are launched for the adapters of the step
    alone, otherwise for as many as there are slots.
    """
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config = SimpleNamespace(max_loras=SLOTS, specialize_active_lora=specialised)
    wrapper = PunicaWrapperGPU(len(owners), len(owners), DEVICE, lora_config=config)
    ids = list(range(100, 100 + SLOTS))
    mapping = tuple(ids[owner] if owner >= 0 else 0 for owner in owners)
    wrapper.update_metadata(LoRAMapping(mapping, mapping, is_prefill=True), ids, SLOTS, 100)
    layer, widths = slots.modules["qk"], tuple(m.h_out for m in MODULES)
    y = torch.zeros(len(owners), sum(widths), dtype=x.dtype, device=DEVICE)
    wrapper.add_lora_linear(y, x.to(DEVICE), layer.lora_a_stacked, layer.lora_b_stacked, 1.0, widths)
    return y.cpu()


def check(
    slots: Slots, expected: Sequence[LoraWeights | None], owners: Sequence[int] = MIXED, *, specialised: bool = False
) -> None:
    """Compare what the kernels read with the dense formula; `expected` has each slot's adapter, None for zeros."""
    x = torch.randn(len(owners), MODULES[0].h_in, generator=torch.Generator().manual_seed(9)).to(DTYPE)
    read = adapted(slots, x, owners, specialised=specialised)
    for row, owner, made in zip(x.double(), owners, read.double(), strict=True):
        weights = expected[owner] if owner >= 0 else None
        if weights is None:
            assert not made.any()
            continue
        low = [(weights.b[m.name].double(), weights.a[m.name].double() @ row) for m in MODULES]
        wanted = torch.cat([b @ narrow for b, narrow in low])
        terms = torch.cat([b.abs() @ narrow.abs() for b, narrow in low])
        assert ((made - wanted).abs() <= ROUNDING * terms).all(), (owner, (made - wanted).abs().max())


@pytest.mark.parametrize(("owners", "specialised"), [(MIXED, False), (MIXED, True), ((1,), True), ((-1, -1), False)])
def test_each_row_is_given_its_own_adapter(owners: Sequence[int], specialised: bool) -> None:
    slots = Slots()
    check(slots, [slots.bring_in(1), slots.bring_in(2)], owners, specialised=specialised)


@pytest.mark.parametrize(
    ("room", "bank", "own"), [(16, ONE, 2), (8, ONE, 0), (16, OTHER, 5), (64, CAT, 0), (64, CAT, 3)]
)
def test_ranks_and_blocks_are_read_whole(room: int, bank: str, own: int) -> None:
    slots = Slots(room)
    check(slots, [slots.bring_in(1, own, bank), slots.bring_in(3, 0, bank)])


def test_a_slot_that_is_taken_over_keeps_nothing_of_before() -> None:
    slots = Slots(64)
    slots.bring_in(1, 4)
    slots.bring_in(2)
    check(slots, [slots.bring_in(3), slots.bring_in(4, bank=OTHER)])
    check(slots, [slots.bring_in(1, bank=CAT), slots.bring_in(2, 2, bank=OTHER)])
    check(slots, [slots.bring_in(3, 2), slots.bring_in(4)])


def test_a_wiped_slot_adds_nothing() -> None:
    slots = Slots()
    slots.bring_in(1, 4)
    kept = slots.bring_in(2)
    erased = slots.written_recipes - {f"mta3:{ONE}:shared:{RECIPES[2]}"}
    slots.remove_adapter(1)
    slots.wipe(erased)
    check(slots, [None, kept])


def other_slot(write: Callable[..., None]) -> Callable[..., None]:
    return lambda self, index, *given, **how: write(self, 1 - index, *given, **how)


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "another slot": ("write", other_slot),
    "nothing is zeroed": ("zero", lambda zero: lambda self, index, first: None),
    "A is taken to be there": ("write", lambda write: lambda *given, has_shared_a: write(*given, has_shared_a=True)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_writer_that_does_wrong_is_found_out(mutant: str) -> None:
    name, wrong = MUTANTS[mutant]
    with patch.object(DeviceBank, name, wrong(getattr(DeviceBank, name))):
        try:
            test_a_slot_that_is_taken_over_keeps_nothing_of_before()
        except AssertionError:
            return
    pytest.fail(f"nothing noticed that {mutant}")


def test_a_rank_has_its_own_slice_of_each_module() -> None:
    """Of two ranks, on the second: q and k are cut by columns, o by rows."""
    rank, parts = 1, (*MODULES, ModuleShape("o", 48, 40))
    columns, rows = bare_layer(MergedColumnParallelLinearWithLoRA, 2), bare_layer(RowParallelLinearWithLoRA)
    for layer in (columns, rows):
        del layer.slice_lora_a, layer.slice_lora_b  # vLLM's own
        layer.tp_size, layer.tp_rank = 2, rank
    columns.output_slices, columns.output_ids, rows.input_size = tuple(m.h_out // 2 for m in MODULES), (rank, rank), 24
    shapes = {columns: [(40, 24), (40, 8)], rows: [(24, 40)]}
    for layer, widths in shapes.items():
        give_slots(layer, widths, 16)
    slots = DeviceSlots.__new__(DeviceSlots)
    make_bare(slots, {"qk": columns, "o": rows}, {"qk": ["q", "k"]})
    matrix = matrix_of(ONE, parts)
    slots.open_bank(ONE, matrix, {m.name: m.name for m in parts})
    assert slots.banks[ONE].b.shape == (4, 8 * (24 + 8 + 40))
    recipe = parse_recipe(f"mta3:{ONE}:shared:{RECIPES[1]}")
    own = own_lora(1, 2)
    own.a["o"], own.b["o"] = torch.randn(2, 48).to(DTYPE), torch.randn(40, 2).to(DTYPE)
    slots.add_adapter(SummedLoRAModel(1, recipe, matrix, own))
    slots.activate_adapter(1)
    whole = stack(fuse(matrix, recipe, DTYPE), UserAdapter(recipe.name, own), DTYPE)
    for layer, place, name in ((columns, 0, "q"), (columns, 1, "k"), (rows, 0, "o")):
        a, b = layer.lora_a_stacked[place][0, 0].cpu(), layer.lora_b_stacked[place][0, 0].cpu()
        wanted_a = whole.a[name][:, 24:] if name == "o" else whole.a[name]
        wanted_b = whole.b[name] if name == "o" else whole.b[name][len(whole.b[name]) // 2 :]
        torch.testing.assert_close(a[:10], wanted_a, rtol=ROUNDING, atol=0)
        torch.testing.assert_close(b[:, :10], wanted_b, rtol=ROUNDING, atol=1e-6)
        assert not a[10:].any() and not b[:, 10:].any()


def test_rows_that_do_not_fit_are_refused_in_figures() -> None:
    slots = Slots()
    with (
        patch("torch.empty", side_effect=torch.OutOfMemoryError),
        pytest.raises(BankError, match=r"rows of bank 11111111 need 0\.0 GiB on c.*: lower MTA_MAX_LORAS, raise"),
    ):
        slots.open_bank(ONE, matrix_of(ONE), {m.name: m.name for m in MODULES})
