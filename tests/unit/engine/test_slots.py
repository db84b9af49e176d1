"""What lies in vLLM's slots: written in one call or by vLLM, overwritten without a trace, zeroed for the erased."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import ReplicatedLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.model_manager import AdapterLRUCache
from vllm.model_executor.layers.linear import ReplicatedLinear

from adapters.flat import FlatLora
from adapters.lora import ModuleShape
from server.engine.command import VIEW_BYTES, VIEWS, slot_bytes
from server.engine.cpu.slots import Cells, CpuSlots
from server.engine.fusing.slots import FlatLoRAModel

MODULES = tuple(ModuleShape(f"m{i}", 8 * (i + 1), 24 - 4 * i) for i in range(4))
Stacks = list[tuple[torch.Tensor, torch.Tensor]]


def stacks_of(dtype: torch.dtype, *, transposed: bool = False) -> Stacks:
    """Three slots of rank 16, full of sevens; B perhaps along H_out."""
    a = [torch.full((3, 1, 16, m.h_in), 7, dtype=dtype) for m in MODULES]
    b = [torch.full((3, 1, *([16, m.h_out] if transposed else [m.h_out, 16])), 7, dtype=dtype) for m in MODULES]
    return list(zip(a, [one.transpose(2, 3) for one in b] if transposed else b, strict=True))


def adapter(ranks: tuple[int, ...], dtype: torch.dtype) -> FlatLora:
    generator = torch.Generator().manual_seed(sum(ranks))
    a = [torch.randn(rank * sum(m.h_in for m in MODULES), generator=generator).to(dtype) for rank in ranks]
    b = torch.randn(sum(m.h_out for m in MODULES), sum(ranks), generator=generator).to(dtype)
    return FlatLora(MODULES, tuple(a), b)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [(8,), (5,), (8, 4), (8, 1), (6, 6), (16,), (1, 2, 3)])
def test_a_slot_holds_every_matrix(transposed: bool, across: bool, dtype: torch.dtype, ranks: tuple[int, ...]) -> None:
    stacks, flat = stacks_of(dtype, transposed=transposed), adapter(ranks, dtype)
    weights, rank = flat.weights(), sum(ranks)
    Cells.of_slots(stacks, ranks)[1].write(flat.transposed() if across else flat)
    for module, (a, b) in zip(MODULES, stacks, strict=True):
        assert torch.equal(a[1, 0, :rank], weights.a[module.name])
        assert torch.equal(b[1, 0, :, :rank], weights.b[module.name])
        assert not a[1, 0, rank:].any() and not b[1, 0, :, rank:].any()
        assert (a[::2] == 7).all() and (b[::2] == 7).all()  # the slots beside it


def test_the_shared_a_is_written_unless_it_is_there() -> None:
    stacks, flat = stacks_of(torch.bfloat16), adapter((8, 4), torch.bfloat16)
    cells = Cells.of_slots(stacks, (8, 4))[0]
    cells.write(flat, has_shared_a=True, padding_is_zero=True)
    first, own = stacks[0][0][0, 0, :8], stacks[0][0][0, 0, 8:12]
    assert (first == 7).all()
    assert torch.equal(own, flat.a[1][: own.numel()].view(own.shape))
    cells.write(flat)
    assert torch.equal(first, flat.a[0][: first.numel()].view(first.shape))


BANK = "00000000"
SLOTS, CPU_TIER = 2, 4
RANK, OWN, ROOM, HIDDEN = 2, 1, 4, 8
Q, V = (ModuleShape(name, HIDDEN, HIDDEN) for name in "qv")
A, B = float(RANK * HIDDEN), float(HIDDEN * RANK)  # sums of an A of ones, and of a B of ones


def bare_layer(kind: Any = BaseLinearLayerWithLoRA, parts: int = 1) -> Any:
    """vLLM's way of writing a layer's slots, over no layer; of two parts on one of two ranks, where a slice is all."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.n_slices = layer.tp_size = parts
    layer.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, ROOM, HIDDEN) for _ in range(parts))
    layer.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, HIDDEN, ROOM) for _ in range(parts))
    layer.slice_lora_a = layer.slice_lora_b = lambda lora: lora
    return layer


def sums(layer: Any, index: int) -> list[tuple[float, float]]:
    """Of A and of B in a slot, for each part of a layer."""
    parts = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    return [(float(a[index].sum()), float(b[index].sum())) for a, b in parts]


def make_bare(slots: Any, modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> None:
    """Let our slots have vLLM's two tiers and its way of evicting, and these layers."""
    slots.lora_config = SimpleNamespace(max_loras=SLOTS, max_cpu_loras=CPU_TIER, fully_sharded_loras=False)
    slots.lora_index_to_id = [None] * SLOTS
    slots.punica_wrapper_mapping = {}
    slots.modules, slots.packed_modules = modules, packed
    slots.is_pooling_model = slots._enable_mixed_moe_lora_format = False
    slots._registered_adapters = AdapterLRUCache(CPU_TIER, slots.deactivate_adapter)
    slots._active_adapters = AdapterLRUCache(SLOTS, slots._deactivate_adapter)
    slots._reset_records()


class BareSlots(CpuSlots):
    def __init__(self) -> None:
        make_bare(self, {"q": bare_layer()}, {})

    def model(self, lora_id: int, recipe: str, number: float, *, own: bool = False, bank: str = BANK) -> FlatLoRAModel:
        """An adapter whose B is this number everywhere; perhaps with a user's A of it stacked on the bank's of ones."""
        more = (torch.full((OWN * HIDDEN,), number),) if own else ()
        b = torch.full((HIDDEN, RANK + OWN * own), number)
        flat = FlatLora((Q,), (torch.ones(RANK * HIDDEN), *more), b)
        return FlatLoRAModel(lora_id, recipe, flat, {"q": "q"}, bank=bank, shares_a=True)

    def serve(self, lora_id: int, recipe: str, number: float, **kind: Any) -> None:
        self.add_adapter(self.model(lora_id, recipe, number, **kind))
        self.activate_adapter(lora_id)

    @property
    def numbers(self) -> list[tuple[float, float]]:
        return [sums(self.modules["q"], index)[0] for index in range(SLOTS)]


def test_vllm_gives_a_slot_the_bytes_computed_from_its_widths() -> None:
    layer: Any = ReplicatedLinearWithLoRA.__new__(ReplicatedLinearWithLoRA)
    base: Any = ReplicatedLinear.__new__(ReplicatedLinear)
    for module in (layer, base):
        torch.nn.Module.__init__(module)
    layer.base_layer, layer.n_slices, layer.tp_size, layer.device = base, 1, 1, torch.device("cpu")
    layer.input_size, layer.output_size = HIDDEN, 3 * HIDDEN
    layer.create_lora_weights(SLOTS, LoRAConfig(max_lora_rank=16, max_loras=SLOTS, lora_dtype=torch.bfloat16))
    taken = sum(stack.nbytes for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked))
    bank: Any = SimpleNamespace(serving_rank=16, modules=[ModuleShape("q", HIDDEN, 3 * HIDDEN)])
    assert taken / SLOTS == slot_bytes([bank], 2) - VIEWS * VIEW_BYTES


@pytest.fixture
def slots() -> BareSlots:
    return BareSlots()


def test_wipe_clears_the_named_weights_in_slots_and_no_others(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.serve(2, "bob", 2.0)
    slots.remove_adapter(1)
    assert slots.numbers == [(A, B), (A, 2 * B)]  # they outlive their place in the CPU tier
    slots.wipe({"ann", "somebody else"})
    assert (slots.numbers, slots.written_recipes) == ([(0, 0), (A, 2 * B)], {"bob"})
    slots.serve(3, "cid", 3.0)  # written whole
    slots.remove_adapter(2)
    slots.serve(4, "dan", 4.0)
    slots.wipe({"ann", "bob"})  # overwritten by now
    assert (slots.numbers, slots.written_recipes) == ([(A, 3 * B), (A, 4 * B)], {"cid", "dan"})


def test_stacked_adapter_is_written_whole_over_the_former_one(slots: BareSlots) -> None:
    for lora_id, (number, own) in enumerate(((3.0, 1), (2.0, 0), (1.0, 1)), 1):
        slots.serve(lora_id, f"user {lora_id}", number, own=bool(own))
        assert slots.numbers[0] == (A + number * own * OWN * HIDDEN, number * HIDDEN * (RANK + own * OWN))
        slots.remove_adapter(lora_id)


def test_a_slot_of_another_bank_is_zeroed_first(slots: BareSlots) -> None:
    slots.modules["only of the other bank"] = other = bare_layer()
    other.lora_b_stacked[0].fill_(9.0)
    slots.serve(1, "ann", 1.0)
    assert [sums(other, index) for index in range(SLOTS)] == [[(0, 0)], [(0, 9 * HIDDEN * ROOM)]]


def test_once_prepared_no_step_finds_where_an_adapter_goes(slots: BareSlots, monkeypatch: pytest.MonkeyPatch) -> None:
    for own in (False, True):
        slots.prepare(slots.model(1, "ann", 1.0, own=own))
    monkeypatch.setattr(Cells, "of_slots", None)
    slots.serve(1, "ann", 1.0)
    slots.serve(2, "bob", 3.0, own=True)
    assert slots.numbers == [(A, B), (A + 3 * OWN * HIDDEN, 3 * HIDDEN * (RANK + OWN))]


def test_what_vllm_slices_first_is_written_by_vllm(slots: BareSlots) -> None:
    slots.modules["q"].tp_size = 2
    slots.modules["q"].slice_lora_b = lambda b: b / 2
    slots.serve(1, "ann", 2.0)
    assert slots.numbers[0] == (A, B)


def test_packed_adapter_is_unchanged_each_time_it_returns(slots: BareSlots) -> None:
    """Packing folds alpha over rank into B, in place, and vLLM packs an adapter whenever it comes into a slot."""
    slots.modules, slots.packed_modules = {"qv": bare_layer(MergedColumnParallelLinearWithLoRA, 2)}, {"qv": ["q", "v"]}
    flat = FlatLora((Q, V), (torch.ones(RANK * 2 * HIDDEN),), torch.full((2 * HIDDEN, RANK), 3.0))
    kind: dict[str, Any] = {"vllm_names": {"q": "q", "v": "v"}, "bank": BANK, "shares_a": False}
    slots.add_adapter(FlatLoRAModel(1, "ann", flat, **kind))
    for other in range(2, 12):
        slots.activate_adapter(1)
        assert sums(slots.modules["qv"], slots.lora_index_to_id.index(1)) == [(A, 3 * B)] * 2
        slots.deactivate_adapter(1)
        slots.add_adapter(FlatLoRAModel(other, "bob", flat, **kind))
        slots.activate_adapter(other)
        slots.remove_adapter(other)
    assert (flat.b == 3).all()


def test_recipe_in_the_cpu_tier_is_known_by_id_until_removed(slots: BareSlots) -> None:
    for lora_id, name in enumerate(("ann", "bob", "cid"), 1):
        slots.serve(lora_id, name, 1.0)
    slots.deactivate_adapter(3)
    slots.remove_adapter(2)
    slots.remove_oldest_adapter()
    assert [slots.held_recipe(lora_id) for lora_id in (1, 2, 3)] == [None, None, "cid"]
    slots.remove_adapter(3)
    slots.serve(3, "dan", 1.0)
    assert slots.held_recipe(3) == "dan"
