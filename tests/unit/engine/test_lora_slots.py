"""What lies in vLLM's slots: written by its own layers, overwritten by the short cut, zeroed for who is erased."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import AdapterLRUCache

from adapters.lora import LoraWeights
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots

SLOTS, RANK, ROOM, HIDDEN = 2, 2, 4, 8
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

    def serve(self, lora_id: int, recipe: str, number: float, tenancy: tuple[str, int] = ("00000000", RANK)) -> None:
        """Bring an adapter into a slot whose B is this number everywhere."""
        weights = LoraWeights(RANK, {"q": SHARED_A}, {"q": torch.full((HIDDEN, RANK), number)})
        self.add_adapter(FusedLoRAModel(lora_id, recipe, weights, {"q": "q"}, tenancy=tenancy, shares_a=True))
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
