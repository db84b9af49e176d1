"""What lies in vLLM's slots: written by its own layers, overwritten by the short cut, zeroed for who is erased."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import AdapterLRUCache

from adapters.flat import FlatLora
from adapters.lora import ModuleShape
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots

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
        self._note_nothing_written()

    def serve(self, lora_id: int, recipe: str, number: float, bank: str = "00000000") -> None:
        """Bring an adapter into a slot whose B is this number everywhere."""
        self.serve_flat(
            lora_id, recipe, FlatLora(MODULES, (SHARED_A.flatten(),), torch.full((HIDDEN, RANK), number)), bank
        )

    def serve_stacked(self, lora_id: int, recipe: str, number: float) -> None:
        """The same, with a user's A of the same number stacked on the bank's."""
        own = torch.full((OWN * HIDDEN,), number)
        b = torch.full((HIDDEN, RANK + OWN), number)
        self.serve_flat(lora_id, recipe, FlatLora(MODULES, (SHARED_A.flatten(), own), b), "00000000")

    def serve_flat(self, lora_id: int, recipe: str, flat: FlatLora, bank: str) -> None:
        self.add_adapter(FusedLoRAModel(lora_id, recipe, flat, {"q": "q"}, bank=bank, shares_a=True))
        self.activate_adapter(lora_id)

    @property
    def numbers(self) -> list[tuple[float, float]]:
        return [self.modules["q"].number(index) for index in range(SLOTS)]


A, B = float(SHARED_A.sum()), float(HIDDEN * RANK)


@pytest.fixture
def slots() -> BareSlots:
    return BareSlots()


def test_a_slot_is_zeroed_when_what_it_holds_is_wiped_and_no_other(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.serve(2, "bob", 2.0)
    slots.wipe({"ann", "somebody else"})
    assert slots.numbers == [(0, 0), (A, 2 * B)]
    assert slots.written == {"bob"}


def test_weights_that_outlived_their_place_among_the_active_are_wiped_too(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.remove_adapter(1)
    assert slots.numbers[0] == (A, B)
    slots.wipe({"ann"})
    assert slots.numbers[0] == (0, 0)


def test_the_next_tenant_of_a_wiped_slot_is_written_whole(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.remove_adapter(1)
    slots.wipe({"ann"})
    slots.serve(2, "bob", 2.0)
    assert slots.numbers[0] == (A, 2 * B)


def test_what_was_overwritten_is_not_wiped_again(slots: BareSlots) -> None:
    slots.serve(1, "ann", 1.0)
    slots.remove_adapter(1)
    slots.serve(2, "bob", 2.0)
    slots.wipe({"ann"})
    assert slots.numbers[0] == (A, 2 * B)
    assert slots.written == {"bob"}


def test_a_stacked_adapter_is_written_whole_and_overwritten_without_a_trace(slots: BareSlots) -> None:
    """Beside the bank's A lies the user's own, and B has more columns."""
    slots.serve_stacked(1, "ann", 3.0)
    assert slots.numbers[0] == (A + 3 * OWN * HIDDEN, 3 * HIDDEN * (RANK + OWN))
    slots.remove_adapter(1)
    slots.serve(2, "bob", 2.0)
    assert slots.numbers[0] == (A, 2 * B)
    slots.remove_adapter(2)
    slots.serve_stacked(3, "cid", 1.0)
    assert slots.numbers[0] == (A + OWN * HIDDEN, HIDDEN * (RANK + OWN))


def test_a_slot_of_another_bank_is_zeroed_first(slots: BareSlots) -> None:
    slots.modules["only of the other bank"] = other = BareLayer()
    other.lora_b_stacked[0].fill_(9.0)
    slots.serve(1, "ann", 1.0)
    assert other.number(0) == (0, 0)
    assert other.number(1) == (0, 9 * HIDDEN * ROOM)


def test_slots_made_ready_hold_what_all_share_and_their_first_tenant_writes_the_rest(slots: BareSlots) -> None:
    flat = FlatLora(MODULES, (SHARED_A.flatten(),), torch.zeros(HIDDEN, RANK))
    slots.make_ready(FusedLoRAModel(1, "", flat, {"q": "q"}, bank="00000000", shares_a=True))
    assert slots.numbers == [(A, 0), (A, 0)]
    assert slots.written == set()
    other_a = FlatLora(MODULES, (torch.zeros(RANK * HIDDEN),), torch.ones(HIDDEN, RANK))
    slots.serve_flat(1, "ann", other_a, "00000000")
    assert slots.numbers[0] == (A, B), "A was there, and must not have been copied again"


def test_what_vllm_slices_first_is_written_by_vllm(slots: BareSlots) -> None:
    slots.modules["q"].tp_size = 2
    slots.modules["q"].slice_lora_a = lambda a: a
    slots.modules["q"].slice_lora_b = lambda b: b / 2
    slots.serve(1, "ann", 2.0)
    assert slots.numbers[0] == (A, B)
