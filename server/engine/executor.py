"""One worker, inside the engine core's own process: how a CPU serves at tensor-parallel size 1.

For CPUs vLLM starts the worker as a second process and lets both poll a shared buffer, each in a loop of
`sched_yield`, while the other computes. On a machine of few cores those two loops starve everything else: clients,
the API process, even kernel threads were seen to wait for seconds. In one process nothing polls, a step costs no
round trip, and every core is free for the model.

Each thread of the model's OpenMP team has a core of its own, as in vLLM's worker processes. At a barrier they wait
spinning: two of them on one core, which is where a kernel puts them when something else computes on the other, a
training worker say, would spend a slice of the scheduler at each of a token's many barriers, and a token some seconds.
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

log = logging.getLogger("mta.engine")

TASKS = Path("/proc/self/task")
ENOUGH_FOR_ALL = 1 << 20
"""Elements that an operation must have to be shared among all threads."""


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's single-process executor under another name: by its own, the CPU platform replaces it."""

    def _init_executor(self) -> None:
        self._bound = bind_team()
        super()._init_executor()

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        with first_of_team(bound=self._bound):
            return super().collective_rpc(*args, **kwargs)


def bind_team() -> bool:
    """Give each thread of the caller's OpenMP team, but the caller, a core; to be called before it computes.

    Returns:
        Whether it was done: where the team is as large as the machine, or as the share of it that this process has.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    cores = sorted(os.sched_getaffinity(0))
    if torch.get_num_threads() != len(cores):
        return False
    before = {task.name for task in TASKS.iterdir()}
    torch.ones(ENOUGH_FOR_ALL).exp_()
    team = sorted({int(task.name) for task in TASKS.iterdir() if task.name not in before})
    if len(team) != len(cores) - 1:
        log.warning("the model's threads keep to no cores: found %d of %d", len(team) + 1, len(cores))
        return False
    for thread, core in zip(team, cores[1:], strict=True):
        os.sched_setaffinity(thread, {core})
    return True


@contextmanager
def first_of_team(*, bound: bool) -> Iterator[None]:
    """The caller on the core that its team has left it, until the block ends: what it starts later is free."""
    if not bound:
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
