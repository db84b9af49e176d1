"""Whose turn it is when slots are short or adapters unfused: who is admitted, and that nobody waits for ever."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched import scheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.engine.core import EngineCore

from server.engine import patches
from server.engine.admission import fair_scheduler
from server.engine.admission.fair_scheduler import PATIENCE_S, FairScheduler, held_back
from server.engine.fusing.manager import prefetch_on_arrival

SLOTS, NOW = 8, 1000.0


class Asked:
    """A request: its recipe (0 for none) and how long it has waited; compared by identity, as vLLM's are."""

    def __init__(self, recipe: int, waited_s: float = 0.0) -> None:
        self.recipe = recipe
        self.lora_request = SimpleNamespace(lora_int_id=recipe) if recipe else None
        self.arrival_time = NOW - waited_s


LONG = PATIENCE_S + 1
FULL = [Asked(recipe) for recipe in range(1, SLOTS + 1) for _ in range(recipe)]
"""All slots taken; recipe 1 has the fewest running requests."""


@pytest.mark.parametrize(
    ("waiting", "stand_back"),
    [
        ([(9, PATIENCE_S / 2), (1,), (2,)], []),  # while nobody has waited long, like goes with like
        ([(9, LONG), (1,), (2,), (0,), (10,), (1,)], [1, 5]),  # the emptiest slot is drained
        ([(1, LONG), (9, LONG), (0,), (2,)], []),  # who came before does not stand back
        ([*((recipe, LONG) for recipe in range(9, 17)), *((recipe,) for recipe in range(1, 9))], [8, 9]),  # not all
        ([(9, LONG), (9, LONG), (1,), (2,)], [2]),  # one recipe that waits, one slot
    ],
)
def test_the_emptiest_slots_are_drained_for_the_overdue(waiting: list[tuple[Any, ...]], stand_back: list[int]) -> None:
    requests: list[Any] = [Asked(*request) for request in waiting]
    running: list[Any] = FULL
    assert held_back(requests, running, SLOTS, NOW) == {requests[place] for place in stand_back}
    assert not held_back(requests, running[1:], SLOTS, NOW)  # while a slot is free nobody stands back


class Bare(FairScheduler):
    """The queue and the batch of a scheduler, over vLLM's rule for slots alone."""

    def __init__(self, waiting: list[Any], running: list[Any]) -> None:
        self.lora_config = SimpleNamespace(max_loras=SLOTS)
        self.waiting, self.running = FCFSRequestQueue(waiting), list(running)


@pytest.fixture(autouse=True)
def only_slots_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule(self: Any, throttle_prefills: bool = False) -> list[Any]:
        slots, admitted = {request.recipe for request in self.running}, []
        for request in self.waiting:
            if request.recipe in slots | {0} or len(slots) < SLOTS:
                admitted.append(request)
                slots |= {request.recipe} - {0}
        self.waiting.remove_requests(admitted)
        self.running += [request for request in admitted if request.recipe]
        return admitted

    monkeypatch.setattr(scheduler.Scheduler, "schedule", schedule)
    monkeypatch.setattr(fair_scheduler.time, "time", lambda: NOW)


def test_a_recipe_gets_its_slot_however_many_keep_coming_for_the_others() -> None:
    """Each step ends one running request of every recipe, and brings a new one for every slot."""
    steps, late = 0, Asked(9, LONG)
    fair = Bare([late], FULL * 2)
    while late in fair.waiting:
        for recipe in range(1, SLOTS + 1):
            mine = [request for request in fair.running if request.recipe == recipe]
            if mine:
                fair.running.remove(mine[0])
            fair.waiting.add_request(Asked(recipe))  # type: ignore[arg-type]
        fair.schedule()
        steps += 1
        assert steps < 5, "nothing ever ends the wait"
    assert late in fair.running


class Fusing:
    """Has fused nothing of what a test lists, and knows in which order it was asked for."""

    def __init__(self, *unfused: int) -> None:
        self.left, self.asked = set(unfused), list[int]()

    def unfused(self, requests: Sequence[Any]) -> set[int]:
        self.asked = [request.lora_int_id for request in requests]
        return self.left & set(self.asked)


@pytest.mark.parametrize(
    ("waiting", "running", "unfused", "admitted"),
    [
        ([(9, LONG), (1,), (2,), (10,), (1,)], FULL, set(), [2]),  # others make way for one that waited too long
        ([(9,), (1,), (0,), (10,), (9,)], FULL[:1], {9, 10}, [1, 2]),  # who is not fused is left out
        ([(9,), (1,)], [], {9}, [1]),  # also while only somebody waiting can run
        ([(9,), (10,), (9,)], [], {9, 10}, [0, 2]),  # nothing else can run: the step waits for the first alone
        ([(9, LONG), (1,), (10,), (2,)], FULL, {10}, [3]),  # both reasons together
    ],
)
def test_who_is_left_out_of_a_step_keeps_their_place(
    waiting: list[tuple[Any, ...]], running: list[Any], unfused: set[int], admitted: list[int]
) -> None:
    requests = [Asked(*request) for request in waiting]
    left = [request for place, request in enumerate(requests) if place not in admitted]
    fair = Bare(requests, running)
    fair.adapter_manager = fuser = Fusing(*unfused)
    assert fair.schedule() == [requests[place] for place in admitted]
    assert list(fair.waiting) == left
    assert fuser.asked == [request.recipe for request in requests if request.recipe]
    if running is not FULL:
        fuser.left.clear()
        assert fair.schedule() == left


def test_an_arriving_request_starts_its_fusion_in_the_engine_core(monkeypatch: pytest.MonkeyPatch) -> None:
    before = EngineCore.preprocess_add_request
    seen: list[str] = []
    manager: Any = SimpleNamespace(prefetch=seen.append)
    with monkeypatch.context() as elsewhere:
        elsewhere.delitem(sys.modules, "vllm.v1.engine.core")
        prefetch_on_arrival(manager)
        assert EngineCore.preprocess_add_request is before
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda self, request: f"preprocessed {request.id}")
    prefetch_on_arrival(manager)
    core: Any = SimpleNamespace(scheduler=SimpleNamespace(adapter_manager=None))
    for number, adapter in enumerate((None, "x")):
        request = SimpleNamespace(id=number, lora_request=adapter)
        assert EngineCore.preprocess_add_request(core, request) == f"preprocessed {number}"
    assert seen == ["x"]
    assert core.scheduler.adapter_manager is manager
    patches.check(patches.CORE)  # as the scheduler does, which is made after it
