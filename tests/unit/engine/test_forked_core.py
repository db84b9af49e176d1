"""The engine core as a fork: it computes although its parent has, and finds what vLLM preloads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.rig.processes import PATIENCE_S
from server.engine.cpu.forked_core import preloads

FORK_AFTER_COMPUTING = """
import signal, threading
import torch
from server.engine.cpu.forked_core import CoreContext
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
    ran = subprocess.run(
        [sys.executable, "-c", FORK_AFTER_COMPUTING], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert ran.stdout.split() == [str(1 << 20), str(1 << 20), "True", "0"], ran.stderr


@pytest.mark.parametrize("given", ["/lib/libgomp.so.1", "/lib/libiomp5.so"])
def test_one_openmp_is_enough(given: str) -> None:
    assert [name for name in preloads(given).split(":") if "omp" in name] == [given]


def test_an_engine_gets_the_openmp_that_torch_has_beside_what_it_was_given() -> None:
    given, *more = preloads("/lib/libother.so").split(":")
    assert given == "/lib/libother.so"
    assert [Path(library).name[:7] for library in more if "omp" in library] == ["libgomp"]
    assert all(Path(library).is_file() for library in more)
