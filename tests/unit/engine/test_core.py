"""What is replaced in vLLM stands in a table; what its core gets on CPU; whose turn it is when slots are short."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

import torch
from vllm.model_executor.models import registry
from vllm.v1.core.sched import scheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from adapters.flat import FlatLora
from bench.rig.processes import PATIENCE_S
from server.engine import patches
from server.engine.admission import fair_scheduler
from server.engine.admission.fair_scheduler import FairScheduler, held_back
from server.engine.command import preloads
from server.engine.cpu.core import in_this_process, with_restarting_generator
from server.engine.cpu.manager import prefetch_on_arrival
from tests.unit.engine.test_fusing_manager import CountingManager
from tests.unit.engine.test_fusing_manager import recipe as request_of


def test_a_models_class_is_inspected_in_the_engines_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_run_in_subprocess", registry._run_in_subprocess)  # put back afterwards
    patches.replace(patches.CPU_INSPECTION, in_this_process)
    assert registry._run_in_subprocess(os.getpid) == os.getpid()


PROGRAM = """
import os, signal, sys, threading, types
import torch
sys.modules["vllm.v1.executor.uniproc_executor"] = types.SimpleNamespace(UniProcExecutor=object)  # vLLM's takes long
from server.engine.cpu.core import THREADS_FOLDER, CoreContext, bind_team, on_first_core
cores = os.sched_getaffinity(0)
torch.set_num_threads(2)
print(torch.ones(1 << 20).exp_().numel(), flush=True)

def core():
    for threads in (len(cores) - 1, len(cores)):
        torch.set_num_threads(threads or 1)
        bound = bind_team()
        places = [sorted(os.sched_getaffinity(int(task.name))) for task in THREADS_FOLDER.iterdir()]
        with on_first_core(is_team_bound=bound):
            inside = os.sched_getaffinity(0)
        kept = sorted(place for place in places if len(place) == 1)
        print(bound, kept, sorted(inside), os.sched_getaffinity(0) == cores, sep=";")
    signal.signal(signal.SIGTERM, lambda *_: None)  # only a main thread may
    print(torch.ones(1 << 20).exp_().numel(), threading.current_thread() is threading.main_thread(), flush=True)

process = CoreContext().Process(target=core)
process.start()
process.join()
print(process.exitcode)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core leaves no choice")
def test_forked_core_computes_and_each_thread_has_its_own_core() -> None:
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    cores = sorted(os.sched_getaffinity(0))
    assert (
        ran.stdout.splitlines()
        == [
            str(1 << 20),
            f"False;[];{cores};True",  # a smaller team is left to the kernel
            f"True;{[[core] for core in cores[1:]]};{cores[:1]};True",
            f"{1 << 20} True",
            "0",
        ]
    ), ran.stderr


def test_engine_preloads_openmp_of_torch_unless_given_one() -> None:
    for given in ("/lib/libgomp.so.1", "/lib/libiomp5.so"):
        assert [name for name in preloads(given).split(":") if "omp" in name] == [given]
    given, *more = preloads("/lib/libother.so").split(":")
    assert given == "/lib/libother.so"
    assert [Path(library).name[:7] for library in more if "omp" in library] == ["libgomp"]
    assert all(Path(library).is_file() for library in more)


def generator_of(generator: torch.Generator | None) -> torch.Generator | None:
    made = CachedRequestState("r", [1, 2, 3], [], None, generator, ([0],), 0, [])
    with_restarting_generator(lambda state: None)(made)
    return made.generator


def test_withdrawn_draw_does_not_change_what_a_seed_gives() -> None:
    def drawn(generator: Any) -> list[float]:
        return torch.empty(4).exponential_(generator=generator).tolist()

    seeded, restarting = (torch.Generator().manual_seed(2**40 + 1) for _ in range(2))
    restarting = generator_of(restarting)
    drawn(restarting)
    restarting.set_offset(restarting.get_offset() - 4)  # as `GPUModelRunner._bookkeeping_sync` does
    assert drawn(restarting) == drawn(seeded)
    assert drawn(restarting) == drawn(seeded)
    assert generator_of(None) is None


SLOTS, NOW = 8, 1000.0


class Asked:
    """A request: its recipe (0 for none) and how long it has waited; compared by identity, as vLLM's are."""

    def __init__(self, recipe: int, waited_s: float = 0.0) -> None:
        self.recipe = recipe
        self.lora_request = SimpleNamespace(lora_int_id=recipe) if recipe else None
        self.arrival_time = NOW - waited_s
        self.request_id = f"{id(self)}"


LONG = fair_scheduler.PATIENCE_S + 1
FULL = [Asked(recipe) for recipe in range(1, SLOTS + 1) for _ in range(recipe)]  # recipe 1 has the fewest requests


@pytest.mark.parametrize(
    ("waiting", "stand_back"),
    [
        ([(9, LONG / 2), (1,), (2,)], []),  # while nobody has waited long, like goes with like
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
        self.grammar_compile_error_reqs: set[str] = set()


@pytest.fixture
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


@pytest.mark.usefixtures("only_slots_count")
def test_waiting_recipe_gets_a_slot_despite_steady_requests() -> None:
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


@pytest.mark.usefixtures("only_slots_count")
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
    fair.adapter_manager = fuser = MagicMock(**{"failed.return_value": set()})
    fuser.unfused.side_effect = lambda asked: unfused & {request.lora_int_id for request in asked}
    assert fair.schedule() == [requests[place] for place in admitted]
    assert list(fair.waiting) == left
    fuser.unfused.assert_called_once_with([request.lora_request for request in requests if request.recipe])
    if running is not FULL:
        fuser.unfused.side_effect = lambda asked: set()
        assert fair.schedule() == left


class FailingManager(CountingManager):
    """Cannot fuse recipe 9."""

    def _flat(self, name: str) -> FlatLora:
        flat = super()._flat(name)
        if name == request_of(9).lora_name:
            raise MemoryError
        return flat


@pytest.mark.usefixtures("only_slots_count")
@pytest.mark.parametrize("running", [FULL[:1], []], ids=["beside others", "alone"])
def test_requests_whose_fusion_fails_twice_end_alone(running: list[Any]) -> None:
    """vLLM sends the error once the step is over; until then it may schedule another step."""
    requests = [Asked(number) for number in (9, 10, 9)]
    for request in requests:
        request.lora_request = request_of(request.recipe)  # type: ignore[assignment]
    fair, manager, admitted = Bare(requests, running), FailingManager(), []
    fair.adapter_manager = manager
    ending, deadline_s = fair.grammar_compile_error_reqs, time.monotonic() + PATIENCE_S
    while (len(ending) < 2 or not admitted) and time.monotonic() < deadline_s:
        admitted += fair.schedule()
    assert ending == {requests[0].request_id, requests[2].request_id}
    assert (admitted, fair.schedule(), list(fair.waiting)) == ([requests[1]], [], [requests[0], requests[2]])
    assert Counter(manager.fused) == {request_of(9).lora_name: 2, request_of(10).lora_name: 1}


def test_arriving_request_starts_its_fusion_in_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
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
