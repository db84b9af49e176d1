"""An engine core on CPU: forked by a parent that has computed, a core for each thread, seeds that begin again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from bench.rig.processes import PATIENCE_S
from server.engine.command import preloads
from server.engine.cpu.fixes import with_restarting_generator


def printed(program: str, **environment: str) -> str:
    """By a Python of its own."""
    command, env = [sys.executable, "-c", program], os.environ | environment
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


FORK_AFTER_COMPUTING = """
import signal, threading
import torch
from server.engine.cpu.fixes import CoreContext
torch.set_num_threads(2)
print(torch.ones(1 << 20).exp_().numel(), flush=True)

def core():
    signal.signal(signal.SIGTERM, lambda *_: None)  # only a main thread may
    torch.set_num_threads(2)
    print(torch.ones(1 << 20).exp_().numel(), threading.current_thread() is threading.main_thread(), flush=True)

process = CoreContext().Process(target=core)
process.start()
process.join()
print(process.exitcode)
"""


def test_a_core_forked_by_a_process_that_has_computed_can_compute() -> None:
    assert printed(FORK_AFTER_COMPUTING).split() == [str(1 << 20), str(1 << 20), "True", "0"]


@pytest.mark.parametrize("given", ["/lib/libgomp.so.1", "/lib/libiomp5.so"])
def test_one_openmp_is_enough(given: str) -> None:
    assert [name for name in preloads(given).split(":") if "omp" in name] == [given]


def test_an_engine_gets_the_openmp_that_torch_has_beside_what_it_was_given() -> None:
    given, *more = preloads("/lib/libother.so").split(":")
    assert given == "/lib/libother.so"
    assert [Path(library).name[:7] for library in more if "omp" in library] == ["libgomp"]
    assert all(Path(library).is_file() for library in more)


PLACES = """
import os, sys, types
import torch
sys.modules["vllm.v1.executor.uniproc_executor"] = types.SimpleNamespace(UniProcExecutor=object)  # vLLM's takes long
from server.engine.cpu.executor import TASKS, bind_team, on_first_core
cores = os.sched_getaffinity(0)
for threads in (len(cores) - 1, len(cores)):
    torch.set_num_threads(threads)
    bound = bind_team()
    places = [sorted(os.sched_getaffinity(int(task.name))) for task in TASKS.iterdir()]
    with on_first_core(bound=bound):
        inside = os.sched_getaffinity(0)
    kept = sorted(place for place in places if len(place) == 1)
    print(bound, kept, sorted(inside), os.sched_getaffinity(0) == cores, sep=";")
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core leaves no choice")
def test_a_team_as_large_as_the_machine_has_a_core_for_each_and_a_smaller_one_is_left_to_the_kernel() -> None:
    cores = sorted(os.sched_getaffinity(0))
    smaller, whole = (line.split(";") for line in printed(PLACES).strip().splitlines()[-2:])
    assert smaller == ["False", "[]", str(cores), "True"]
    assert whole == ["True", str([[core] for core in cores[1:]]), str(cores[:1]), "True"]


def drawn(generator: torch.Generator) -> list[float]:
    return torch.empty(4).exponential_(generator=generator).tolist()


def state(generator: torch.Generator | None) -> CachedRequestState:
    made = CachedRequestState("r", [1, 2, 3], [], None, generator, ([0],), 0, [])
    with_restarting_generator(lambda state: None)(made)
    return made


def test_a_draw_that_is_taken_back_does_not_change_what_a_seed_gives() -> None:
    made = state(torch.Generator().manual_seed(2**40 + 1)).generator
    assert made is not None
    drawn(made)
    made.set_offset(made.get_offset() - 4)  # as `GPUModelRunner._bookkeeping_sync` does
    assert drawn(made) == drawn(torch.Generator().manual_seed(2**40 + 1))
    assert drawn(made) != drawn(torch.Generator().manual_seed(2**40 + 1))


def test_a_request_without_a_seed_has_no_generator() -> None:
    assert state(None).generator is None
