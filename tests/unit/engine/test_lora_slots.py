"""What lies in vLLM's slots: written by its own layers, overwritten by the short cut, zeroed for who is erased."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.model_manager import AdapterLRUCache

from adapters.flat import FlatLora
from adapters.lora import ModuleShape
from server.engine.fusing.cells import Cells
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots

BANK = "00000000"
SLOTS, RANK, OWN, ROOM, HIDDEN = 2, 2, 1, 4, 8
MODULES = (ModuleShape("q", HIDDEN, HIDDEN),)
SHARED_A = torch.ones(RANK, HIDDEN)


class BareLayer(BaseLinearLayerWithLoRA):  # type: ignore[misc]
    """vLLM's way of writing a layer's slots, over no layer."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.n_slices, self.tp_size = 1, 1
        self.lora_a_stacked = (torch.zeros(SLOTS, 1, ROOM, HIDDEN),)
        self.lora_b_stacked = (torch.zeros(SLOTS, 1, HIDDEN, ROOM),)

    def number(self, index: int) -> tuple[float, float]:
        """The sums of A and of B in a slot."""
        return float(self.lora_a_stacked[0][index].sum()), float(self.lora_b_stacked[0][index].sum())


class BareSlots(FusedSlots):
    """Our slots over one layer, no model."""

    def __init__(self) -> None:
        self.lora_config = SimpleNamespace(max_loras=SLOTS, max_cpu_loras=4)
        self.lora_index_to_id = [None] * SLOTS
        self.modules: dict[str, Any] = {"q": BareLayer()}
        self.packed_modules: dict[str, list[str]] = {}
        self.is_pooling_model = self._enable_mixed_moe_lora_format = False
        self._registered_adapters = AdapterLRUCache(4, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(SLOTS, self._deactivate_adapter)
        self._reset_records()

    def model(self, lora_id: int, recipe: str, number: float, *, own: bool = False, bank: str = BANK) -> FusedLoRAModel:
        """An adapter whose B is this number everywhere; perhaps with a user's A of it stacked on the bank's."""
        more = (torch.full((OWN * HIDDEN,), number),) if own else ()
        b = torch.full((HIDDEN, RANK + OWN * own), number)
        flat = FlatLora(MODULES, (SHARED_A.flatten(), *more), b)
        return FusedLoRAModel(lora_id, recipe, flat, {"q": "q"}, bank=bank, shares_a=True)

    def serve(self, lora_id: int, recipe: str, number: float, **kind: Any) -> None:
        """Bring such an adapter into a slot."""
        self.add_adapter(self.model(lora_id, recipe, number, **kind))
        self.activate_adapter(lora_id)

    @property
    def numbers(self) -> list[tuple[float, float]]:
        return [self.modules["q"].number(index) for index in range(SLOTS)]


PAIR = (ModuleShape("q", HIDDEN, HIDDEN), ModuleShape("v", HIDDEN, HIDDEN))


class PackedLayer(MergedColumnParallelLinearWithLoRA):  # type: ignore[misc]
    """vLLM's way of writing a packed layer's slots on one of two ranks, over no layer; a slice is all of it."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.n_slices, self.tp_size = 2, 2
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, ROOM, HIDDEN) for _ in PAIR)
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, HIDDEN, ROOM) for _ in PAIR)

    def slice_lora_a(self, lora_a: list[Any]) -> list[Any]:
        return lora_a

    def slice_lora_b(self, lora_b: list[Any]) -> list[Any]:
        return lora_b


A, B = float(SHARED_A.sum()), float(HIDDEN * RANK)


@pytest.fixture
def slots() -> BareSlots:
    return BareSlots()


def test_a_slot_is_zeroed_when_what_it_holds_is_wiped_and_no_other(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.serve(2, "bob", 2.0)
    slots.wipe({"ann", "somebody else"})
    assert slots.numbers == [(0, 0), (A, 2 * B)]
    assert slots.written_recipes == {"bob"}


def test_weights_that_outlived_their_place_are_wiped_too_and_the_next_are_written_whole(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.remove_adapter(1)
    assert slots.numbers[0] == (A, B)
    slots.wipe({"ann"})
    assert slots.numbers[0] == (0, 0)
    slots.serve(2, "bob", 2.0)
    assert slots.numbers[0] == (A, 2 * B)


def test_what_was_overwritten_is_not_wiped_again(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.remove_adapter(1)
    slots.serve(2, "bob", 2.0)
    slots.wipe({"ann"})
    assert slots.numbers[0] == (A, 2 * B)
    assert slots.written_recipes == {"bob"}


def test_a_stacked_adapter_is_written_whole_and_overwritten_without_a_trace(slots: BareSlots) -> None:
    """Beside the bank's A lies the user's own, and B has more columns."""
    slots.serve(1, "ann", 3.0, own=True)
    assert slots.numbers[0] == (A + 3 * OWN * HIDDEN, 3 * HIDDEN * (RANK + OWN))
    slots.remove_adapter(1)
    slots.serve(2, "bob", 2.0)
    assert slots.numbers[0] == (A, 2 * B)
    slots.remove_adapter(2)
    slots.serve(3, "cid", 1.0, own=True)
    assert slots.numbers[0] == (A + OWN * HIDDEN, HIDDEN * (RANK + OWN))


def test_a_slot_of_another_bank_is_zeroed_first(slots: BareSlots) -> None:
    slots.modules["only of the other bank"] = other = BareLayer()
    other.lora_b_stacked[0].fill_(9.0)
    slots.serve(1, "ann", 1.0)
    assert other.number(0) == (0, 0)
    assert other.number(1) == (0, 9 * HIDDEN * ROOM)


def test_once_prepared_no_step_finds_out_where_an_adapter_goes(
    slots: BareSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the first of a kind nor the first of it in a slot."""
    for own in (False, True):
        slots.prepare(slots.model(1, "ann", 1.0, own=own))
    monkeypatch.setattr(Cells, "of_slots", None)
    slots.serve(1, "ann", 1.0)
    slots.serve(2, "bob", 3.0, own=True)
    assert slots.numbers == [(A, B), (A + 3 * OWN * HIDDEN, 3 * HIDDEN * (RANK + OWN))]


def test_what_vllm_slices_first_is_written_by_vllm(slots: BareSlots) -> None:
    slots.modules["q"].tp_size = 2
    slots.modules["q"].slice_lora_a = lambda a: a
    slots.modules["q"].slice_lora_b = lambda b: b / 2
    slots.serve(1, "ann", 2.0)
    assert slots.numbers[0] == (A, B)


def test_what_vllm_packed_is_the_same_each_time_it_is_brought_back(slots: BareSlots) -> None:
    """Packing folds alpha over rank into B, in place, and vLLM packs an adapter whenever it comes into a slot."""
    layer = slots.modules["qv"] = PackedLayer()
    slots.packed_modules = {"qv": ["q", "v"]}
    del slots.modules["q"]
    flat = FlatLora(PAIR, (torch.ones(RANK * 2 * HIDDEN),), torch.full((2 * HIDDEN, RANK), 3.0))
    names = {module.name: module.name for module in PAIR}
    slots.add_adapter(FusedLoRAModel(1, "ann", flat, names, bank=BANK, shares_a=False))
    for other in range(2, 12):
        slots.activate_adapter(1)
        index = slots.lora_index_to_id.index(1)
        assert [float(b[index].sum()) for b in layer.lora_b_stacked] == [3 * B, 3 * B]
        assert [float(a[index].sum()) for a in layer.lora_a_stacked] == [A, A]
        slots.deactivate_adapter(1)
        slots.add_adapter(FusedLoRAModel(other, "bob", flat, names, bank=BANK, shares_a=False))
        slots.activate_adapter(other)
        slots.remove_adapter(other)
    assert (flat.b == 3).all()


def test_what_the_cpu_tier_holds_under_an_id_is_known_until_it_lets_go_of_it(slots: BareSlots) -> None:
    """By every way out: removed, made room, or another recipe under the same id."""
    for lora_id, name in enumerate(("ann", "bob", "cid"), 1):
        slots.serve(lora_id, name, 1.0)
    slots.deactivate_adapter(3)
    slots.remove_adapter(2)
    slots.remove_oldest_adapter()
    assert [slots.held_recipe(lora_id) for lora_id in (1, 2, 3)] == [None, None, "cid"]
    slots.remove_adapter(3)
    slots.serve(3, "dan", 1.0)
    assert slots.held_recipe(3) == "dan"
