"""Executor that runs a single worker inside the engine core's process, for CPUs with tensor-parallel size 1.

On CPUs, vLLM's worker is a second process, and each process polls a shared buffer while the other computes. With few
cores this starves everything else; even kernel threads waited for seconds. This executor does not poll.

Each thread of the model's OpenMP team is bound to its own core, because the threads spin at barriers. With two threads
on one core, because another process uses a core, a token would take several seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from server.engine import patches

log = logging.getLogger("mta.engine")

TASKS = Path("/proc/self/task")
PARALLEL_ELEMENTS = 1 << 20  # number of elements for which an operation uses all threads


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's single-process executor under a new name, because vLLM's CPU platform replaces the original."""

    def _init_executor(self) -> None:
        patches.check(patches.CPU_CORE)
        self._bound = bind_team()
        super()._init_executor()

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        with on_first_core(bound=self._bound):
            return super().collective_rpc(*args, **kwargs)


def bind_team() -> bool:
    """Bind each thread of the caller's OpenMP team, except the caller, to its own core; call before any computation.

    Return whether the threads are bound; they are only if the team has as many threads as this process has cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if torch.get_num_threads() != len(cores):
        return False
    before = {task.name for task in TASKS.iterdir()}
    torch.ones(PARALLEL_ELEMENTS).exp_()
    team = sorted({int(task.name) for task in TASKS.iterdir() if task.name not in before})
    if len(team) != len(cores) - 1:
        log.warning("cannot bind the model's threads to cores: found %d of %d threads", len(team) + 1, len(cores))
        return False
    for thread, core in zip(team, cores[1:], strict=True):
        os.sched_setaffinity(thread, {core})
    return True


@contextmanager
def on_first_core(*, bound: bool) -> Iterator[None]:
    """Keep the caller on the core that its team leaves free until the block ends; new threads stay unbound."""
    if not bound:
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
