"""The worker's adapter manager, on vLLM's own caches without a model: what it fuses, and when; what it evicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from threading import Event, Thread, current_thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from adapters.flat import FlatLora
from bench.rig.processes import PATIENCE_S, wait_until
from server.engine.cpu.manager import CpuLoRAManager
from server.engine.cpu.prefetch import MAX_PREFETCHED, FusionPrefetcher
from server.engine.fusing.slots import FlatLoRAModel, Footprint
from tests.unit.engine.test_slots import BANK, CPU_TIER, BareSlots


class EmptySlots(BareSlots):
    """Without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = {}
        self.prepared: list[tuple[Footprint, str]] = []

    def _writes(self, model: Any) -> bool:
        return isinstance(model, FlatLoRAModel)

    def _overwrite(self, index: int, model: FlatLoRAModel, before: Any) -> None: ...

    def prepare(self, model: FlatLoRAModel) -> None:
        self.prepared.append((model.footprint, current_thread().name))


class CountingManager(CpuLoRAManager):
    def __init__(self) -> None:
        self._adapter_manager = EmptySlots()
        self.metrics = self._adapter_manager.metrics
        self._users = {}
        self._vllm_names = {BANK: {}}
        self._matrices: Any = {BANK: SimpleNamespace(shared_a=None)}
        self._prefetcher = FusionPrefetcher(self._fuse)
        self.fused: list[str] = []
        self.fusing, self.gate = Event(), Event()
        self.gate.set()

    def _flat(self, name: str) -> FlatLora:
        self.fused.append(name)
        self.fusing.set()
        assert self.gate.wait(PATIENCE_S)
        return FlatLora((), (), torch.zeros(0, 8))

    def arrive(self, *requests: LoRARequest) -> None:
        """The first one's fusion is under way, and goes on until `gate` opens."""
        self.gate.clear()
        self.fusing.clear()
        for request in requests:
            self.prefetch(request)
        assert self.fusing.wait(PATIENCE_S)

    @contextmanager
    def meanwhile(self, act: Callable[[Any], Any], on: Any) -> Iterator[None]:
        """Something that waits for a fusion, until the block ends, which opens the `gate`."""
        thread = Thread(target=act, args=(on,))
        thread.start()
        yield
        self.gate.set()
        thread.join(PATIENCE_S)


def recipe(lora_id: int, name: str | None = None) -> LoRARequest:
    text = name or f"mta3:{BANK}:shared:c+a{lora_id:02d}*1000"
    return LoRARequest(lora_name=text, lora_int_id=lora_id, lora_path=text)


def names_of(*lora_ids: int) -> list[str]:
    return [recipe(lora_id).lora_name for lora_id in lora_ids]


def stacked(letter: str) -> LoRARequest:
    return recipe(ord(letter), f"mta3:{BANK}:shared:c:u-{letter * 25}e.{letter * 25}e")


@pytest.fixture
def manager() -> CountingManager:
    return CountingManager()


def active(manager: CountingManager) -> set[int]:
    return {lora_id for lora_id in manager._adapter_manager.lora_index_to_id if lora_id is not None}


def counted(manager: CountingManager) -> dict[str, float]:
    found = re.findall(r"^mta_engine_(\w+?)(?:_seconds_count|_total) (\S+)$", manager.metrics.text, re.MULTILINE)
    return {name: float(value) for name, value in found if float(value)}


@pytest.mark.parametrize("order", [(1, 3), (3, 1)])
def test_a_new_adapter_never_takes_a_slot_that_the_step_uses(manager: CountingManager, order: tuple[int, int]) -> None:
    """Slots {1, 2}, 1 the older; a step of {1, 3} must take 2's slot, whatever order the set is walked in."""
    manager._apply_adapters({recipe(1)})
    manager._apply_adapters({recipe(2), recipe(1)})
    manager._adapter_manager._active_adapters.touch(2)
    manager._apply_adapters(dict.fromkeys(recipe(i) for i in order))  # type: ignore[arg-type]  # an ordered set
    assert (active(manager), counted(manager)["slot_write"]) == ({1, 3}, 3)


def test_fusing_ahead_takes_no_slot_and_evicts_nothing_in_use(manager: CountingManager) -> None:
    manager._apply_adapters({recipe(1), recipe(2)})
    for ahead in range(3, 20):
        manager.add_adapter(recipe(ahead))
        manager._apply_adapters({recipe(1), recipe(2)})
    assert (active(manager), counted(manager)["slot_write"]) == ({1, 2}, 2)
    assert (manager.fused.count(recipe(1).lora_name), len(manager.resident())) == (1, CPU_TIER)


def test_an_id_that_held_another_recipe_is_fused_anew(manager: CountingManager) -> None:
    other = recipe(1, f"mta3:{BANK}:shared:c+a09*1")
    manager._apply_adapters({recipe(1)})
    manager._apply_adapters({other})
    assert manager.resident() == [other.lora_name]
    assert manager.fused == [*names_of(1), other.lora_name]
    for step, problem in (
        ({recipe(1), other}, "two adapters under"),
        ({*map(recipe, range(1, 4))}, "3 adapters, there are 2"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            manager._apply_adapters(step)


def test_what_is_released_is_held_nowhere_any_more(manager: CountingManager) -> None:
    """Bytes alone, a fusion alone, in a slot, and in a slot that the CPU tier has forgotten."""
    raw, fused, active, forgotten = requests = [stacked(letter) for letter in "abcd"]
    for request in (active, forgotten):
        manager.hold(request.lora_name, b"")
        manager._apply_adapters({request})
    manager.hold(fused.lora_name, b"")
    manager._users.clear()
    manager._users[raw.lora_name] = b""
    manager._adapter_manager.remove_adapter(forgotten.lora_int_id)
    names = [request.lora_name for request in requests]
    assert manager.held() == names
    manager.release(names[1:])
    assert manager.held() == names[:1]
    manager.release(names)
    assert manager.held() == manager.resident() == manager._prefetcher.names == []


def test_two_requests_for_a_new_recipe_fuse_it_once(manager: CountingManager) -> None:
    manager.arrive(recipe(1), recipe(1))
    with manager.meanwhile(manager._apply_adapters, {recipe(1)}):
        manager.prefetch(recipe(1))
    manager.prefetch(recipe(1))  # it is here now
    manager._apply_adapters({recipe(1)})
    assert (manager.fused, manager._prefetcher.names, active(manager)) == (names_of(1), [], {1})
    ((footprint, thread),) = manager._adapter_manager.prepared  # where it goes is found out ahead too
    assert (footprint, thread[:8]) == ((BANK, ()), "mta-fuse")


def test_step_waits_for_a_fusion_already_under_way(manager: CountingManager) -> None:
    """Both slots are taken, by one that the step uses and one that it does not."""
    manager._apply_adapters({recipe(1), recipe(2)})
    manager.arrive(recipe(3))
    with manager.meanwhile(manager._apply_adapters, {recipe(1), recipe(3)}):
        assert active(manager) == {1, 2}
    assert active(manager) == {1, 3}
    assert counted(manager) == {"fuse": 3, "bring_in": 3, "slot_write": 3, "slot_evictions": 1}


def test_user_erased_during_the_fusion_leaves_nothing(manager: CountingManager) -> None:
    name = stacked("a").lora_name
    manager.gate.clear()
    manager.hold(name, b"")
    assert manager.fusing.wait(PATIENCE_S)
    assert manager.held() == [name]
    with manager.meanwhile(manager.release, [name]):
        pass
    assert manager.held() == manager._prefetcher.names == manager.resident() == []


def test_fusing_thread_uses_one_thread_if_vllm_disables_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    try:
        assert FusionPrefetcher(lambda name: torch.get_num_threads()).wait("x").result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch._C.set_num_threads(threads)


def test_awaited_fusions_displace_those_without_a_waiter() -> None:
    prefetcher = FusionPrefetcher(str.upper)
    for number in range(MAX_PREFETCHED):
        prefetcher.start(f"old {number}")
    prefetcher.start("new")
    assert "new" not in prefetcher.names
    prefetcher.unfinished(["old 1", "new"])
    wait(prefetcher._futures.values(), PATIENCE_S)
    assert not prefetcher.unfinished(["old 1", "new"])
    assert prefetcher.names == [*(f"old {number}" for number in range(1, MAX_PREFETCHED)), "new"]
    assert prefetcher.wait("old 0").result() == "OLD 0"
    assert len(prefetcher.names) == MAX_PREFETCHED


def test_first_waiting_recipes_are_fused_and_the_rest_in_turn() -> None:
    prefetcher, waiting = FusionPrefetcher(str.upper), [f"{number}" for number in range(2 * MAX_PREFETCHED)]
    for taken in range(MAX_PREFETCHED):
        prefetcher.unfinished(waiting[taken:])
        wait(prefetcher._futures.values(), PATIENCE_S)
        assert prefetcher.unfinished(waiting[taken:]) == set(waiting[taken + MAX_PREFETCHED :])
        assert prefetcher.names == waiting[taken : taken + MAX_PREFETCHED]
        prefetcher.wait(waiting[taken]).result()
        prefetcher.discard(waiting[taken])


def test_step_waits_for_its_own_fusions_and_not_for_queued_ones(manager: CountingManager) -> None:
    manager.arrive(*map(recipe, range(1, 6)))
    with manager.meanwhile(manager._apply_adapters, dict.fromkeys((recipe(5), recipe(4)))):
        wait_until(lambda: manager._prefetcher.names[:1] == names_of(5), "the step to wait")
    assert manager.fused[:3] == names_of(1, 5, 4)
    manager._apply_adapters({recipe(2), recipe(3)})
    assert manager.fused[3:] == names_of(2, 3)


def test_who_waits_is_unfused_until_their_adapter_is_ready(manager: CountingManager) -> None:
    foreign = LoRARequest(lora_name="foreign", lora_int_id=7, lora_path="/folder")
    manager._apply_adapters({recipe(1)})
    manager.gate.clear()
    assert manager.unfused([recipe(1), recipe(2), foreign]) == {2}
    manager.gate.set()
    wait_until(lambda: not manager.unfused([recipe(2)]), "the fusion")
    manager._apply_adapters({recipe(2)})
    assert manager.unfused([recipe(1), recipe(2)]) == set()
    assert manager.fused == names_of(1, 2)


def test_a_fusion_that_failed_once_is_tried_again() -> None:
    prefetcher = FusionPrefetcher[str](MagicMock(side_effect=[MemoryError, "fused"]))
    prefetcher.start("x")
    assert prefetcher.wait("x").result() == "fused"


def test_a_fusion_that_failed_twice_is_new_for_a_later_request() -> None:
    prefetcher = FusionPrefetcher[str](MagicMock(side_effect=[MemoryError, MemoryError, "fused"]))
    prefetcher.start("x")
    assert isinstance(prefetcher.wait("x").exception(), MemoryError)
    assert prefetcher.names == []
    assert prefetcher.unfinished(["x"]) == set()  # it is not tried a third time
    assert (prefetcher.take_failed(["x", "y"]), prefetcher.take_failed(["x"])) == ({"x"}, set())
    assert prefetcher.wait("x").result() == "fused"


def test_an_adapter_whose_bytes_came_late_is_fused_again(
    manager: CountingManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = stacked("a")
    monkeypatch.setattr(manager, "_flat", lambda name: (manager._users[name], FlatLora((), (), torch.zeros(0, 8)))[1])
    manager.wait_for(late)
    manager.hold(late.lora_name, b"")
    manager._apply_adapters({late})
    assert manager.resident() == [late.lora_name]


def test_a_wait_before_the_step_counts_for_its_first_adapter(manager: CountingManager) -> None:
    manager.wait_for(recipe(1))
    assert manager._waited_s > 0
    manager._waited_s = 1000.0
    manager._apply_adapters({recipe(1), recipe(2)})
    found = re.search(r"^mta_engine_bring_in_seconds_sum (\S+)$", manager.metrics.text, re.MULTILINE)
    assert found and 1000 <= float(found[1]) < 2000


def test_an_adapter_from_a_folder_counts_as_loaded(manager: CountingManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", lambda self, request: LoRAModel(7, 8, {}))
    monkeypatch.setattr(LRUCacheLoRAModelManager, "_add_adapter", lambda self, lora: None)
    manager.add_adapter(LoRARequest(lora_name="foreign", lora_int_id=7, lora_path="/folder"))
    assert (counted(manager), manager.fused) == ({"load": 1}, [])
