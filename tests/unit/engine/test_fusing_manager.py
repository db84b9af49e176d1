"""Eviction in the worker's adapter manager, on vLLM's own caches without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.lora.model_manager import AdapterLRUCache
from vllm.lora.request import LoRARequest

from adapters.lora import LoraWeights
from server.engine.fusing.manager import FusingLoRAManager
from server.engine.fusing.slots import FusedLoRAModel, FusedSlots

SLOTS, CPU_TIER = 2, 4


class BareSlots(FusedSlots):
    """Our slots over vLLM's two tiers and its way of evicting, without layers."""

    def __init__(self) -> None:
        self.lora_config = SimpleNamespace(max_loras=SLOTS, max_cpu_loras=CPU_TIER)
        self.lora_index_to_id = [None] * SLOTS
        self.modules: dict[str, Any] = {}
        self._registered_adapters = AdapterLRUCache(CPU_TIER, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(SLOTS, self._deactivate_adapter)
        self._note_nothing_written()
        self.activated: list[int] = []

    def _write(self, index: int, model: FusedLoRAModel) -> None:
        """Of the way of vLLM, what remains without layers to write to."""
        self._active_adapters[model.id] = None
        self.lora_index_to_id[index] = model.id

    def activate_adapter(self, lora_id: int) -> bool:
        made: bool = super().activate_adapter(lora_id)
        if made:
            self.activated.append(lora_id)
        return made


class CountingManager(FusingLoRAManager):
    """Our manager with a fusion that only counts."""

    def __init__(self) -> None:
        self._adapter_manager = BareSlots()
        self._users = {}
        self.fused: list[str] = []

    def _load_adapter(self, lora_request: LoRARequest) -> FusedLoRAModel:
        self.fused.append(lora_request.lora_name)
        nothing = LoraWeights(8, {}, {})
        return FusedLoRAModel(
            lora_request.lora_int_id,
            lora_request.lora_name,
            nothing,
            {},
            tenancy=("00000000", 8),
            shares_a=True,
        )


def recipe(lora_id: int, name: str | None = None) -> LoRARequest:
    text = name or f"mta1:00000000:shared:c+a{lora_id:02d}*1000"
    return LoRARequest(lora_name=text, lora_int_id=lora_id, lora_path=text)


@pytest.fixture
def manager() -> CountingManager:
    return CountingManager()


def active(manager: CountingManager) -> set[int]:
    return {lora_id for lora_id in manager._adapter_manager.lora_index_to_id if lora_id is not None}


def test_a_step_fuses_what_is_missing_once(manager: CountingManager) -> None:
    manager._apply_adapters({recipe(1), recipe(2)})
    manager._apply_adapters({recipe(1), recipe(2)})
    assert sorted(manager.fused) == [recipe(1).lora_name, recipe(2).lora_name]
    assert active(manager) == {1, 2}


@pytest.mark.parametrize("order", [(1, 3), (3, 1)])
def test_a_new_adapter_never_takes_the_slot_of_one_the_same_step_uses(
    manager: CountingManager, order: tuple[int, int]
) -> None:
    """Slots {1, 2}, 1 the older; a step of {1, 3} must take 2's slot, whatever order the set is walked in."""
    manager._apply_adapters({recipe(1)})
    manager._apply_adapters({recipe(2), recipe(1)})
    manager._adapter_manager._active_adapters.touch(2)
    manager._adapter_manager.activated.clear()
    manager._apply_adapters(dict.fromkeys(recipe(i) for i in order))  # type: ignore[arg-type]  # an ordered set
    assert active(manager) == {1, 3}
    assert manager._adapter_manager.activated == [3]


def test_fusing_ahead_takes_no_slot_and_evicts_nothing_in_use(manager: CountingManager) -> None:
    manager._apply_adapters({recipe(1), recipe(2)})
    for ahead in range(3, 20):
        manager.add_adapter(recipe(ahead))
        manager._apply_adapters({recipe(1), recipe(2)})
    assert active(manager) == {1, 2}
    assert sorted(manager._adapter_manager.activated) == [1, 2]
    assert manager.fused.count(recipe(1).lora_name) == 1
    assert len(manager.resident()) == CPU_TIER


def test_the_cpu_tier_holds_no_more_than_its_size(manager: CountingManager) -> None:
    for lora_id in range(1, 50):
        manager._apply_adapters({recipe(lora_id)})
        assert len(manager.resident()) <= CPU_TIER


def test_an_id_that_held_another_recipe_is_fused_anew(manager: CountingManager) -> None:
    manager._apply_adapters({recipe(1)})
    other = recipe(1, "mta1:00000000:shared:c+a09*1")
    manager._apply_adapters({other})
    assert manager.resident() == [other.lora_name]
    assert manager.fused == [recipe(1).lora_name, other.lora_name]


def test_what_is_released_is_held_nowhere_any_more(manager: CountingManager) -> None:
    """Somebody who is waiting only, in a slot, and in a slot that others took over in the CPU tier."""
    names = [f"mta1:00000000:shared:c:u-{letter * 25}e.{letter * 25}e" for letter in "abc"]
    for lora_id, name in enumerate(names[1:], 1):
        manager._users[name] = Any  # type: ignore[assignment]
        manager._apply_adapters({recipe(lora_id, name)})
    manager._users[names[0]] = Any  # type: ignore[assignment]
    manager._adapter_manager.remove_adapter(2)
    assert manager.held() == set(names)
    manager.release([names[2]])
    assert manager.held() == set(names[:2])
    manager.release(names)
    assert manager.held() == set()
    assert manager.resident() == []


def test_two_recipes_under_one_id_in_one_step_are_refused(manager: CountingManager) -> None:
    with pytest.raises(RuntimeError, match="two adapters under one id"):
        manager._apply_adapters({recipe(1), recipe(1, "mta1:00000000:shared:c+a09*1")})


def test_more_recipes_than_slots_in_one_step_are_refused(manager: CountingManager) -> None:
    with pytest.raises(RuntimeError, match="3 adapters, there are 2 slots"):
        manager._apply_adapters({recipe(1), recipe(2), recipe(3)})
