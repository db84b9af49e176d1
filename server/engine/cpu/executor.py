"""One worker, inside the engine core's own process: how a CPU serves at tensor-parallel size 1.

On CPUs vLLM's worker is a second process, and each of the two polls a shared buffer while the other computes: on few
cores that starves everything else, even kernel threads were seen to wait for seconds. Here nothing polls.

Each thread of the model's OpenMP team has a core of its own, because they spin at barriers: with two on one core, when
something else keeps the other busy, a token would take some seconds.
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
ENOUGH_FOR_ALL = 1 << 20  # elements enough for an operation to be shared among all threads


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's single-process executor under another name: under its own, the CPU platform replaces it."""

    def _init_executor(self) -> None:
        patches.check(patches.CPU_CORE)
        self._bound = bind_team()
        super()._init_executor()

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        with first_of_team(bound=self._bound):
            return super().collective_rpc(*args, **kwargs)


def bind_team() -> bool:
    """Give each thread of the caller's OpenMP team but the caller a core, before anything is computed.

    Answers whether it is done: only if the team has as many threads as this process has cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if torch.get_num_threads() != len(cores):
        return False
    before = {task.name for task in TASKS.iterdir()}
    torch.ones(ENOUGH_FOR_ALL).exp_()
    team = sorted({int(task.name) for task in TASKS.iterdir() if task.name not in before})
    if len(team) != len(cores) - 1:
        log.warning("the model's threads are not bound to cores: found %d of %d", len(team) + 1, len(cores))
        return False
    for thread, core in zip(team, cores[1:], strict=True):
        os.sched_setaffinity(thread, {core})
    return True


@contextmanager
def first_of_team(*, bound: bool) -> Iterator[None]:
    """Keep the caller on the core that its team leaves free, until the block ends; later threads are not bound."""
    if not bound:
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
