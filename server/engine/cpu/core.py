"""The engine core on CPUs: how it forks, which cores its threads use, and fixes of attention and of seeded requests."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from server.engine import patches

log = logging.getLogger("vllm.mta")

START_METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
THREADS_FOLDER = Path("/proc/self/task")  # one entry per thread of this process, named by its id
PARALLEL_ELEMENTS = 1 << 20  # number of elements for which an operation uses all threads


def install() -> None:
    patches.replace(patches.CPU_CONFIG_UPDATE, with_fork)
    patches.replace(patches.CPU_INSPECTION, in_this_process)
    patches.replace(patches.CPU_CONTEXT, with_fork_context)
    patches.replace(patches.CPU_ATTENTION, without_amx)
    patches.replace(patches.CPU_SEEDS, with_restarting_generator)


def with_fork(update_config: Callable[[Any], None]) -> Any:
    """Fork the engine core, so that it need not import vLLM again: 10.6 s of CPU time for a tiny model, not 24.3 s.

    vLLM's CPU platform always spawns the core, for two reasons. First, it preloads libraries into the core; here the
    whole engine preloads them (`command.py`). Second, OpenMP hangs in a fork if the forking thread has a team, because
    the fork lacks the team's threads; here a thread without a team does the fork (`CoreContext`).
    """

    def update_config_and_fork(config: Any) -> None:
        update_config(config)
        if config.parallel_config.world_size == 1:
            os.environ[START_METHOD_VARIABLE] = "fork"

    return staticmethod(update_config_and_fork)


def in_this_process(run_in_subprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Inspect the model's class here: vLLM starts a process for it, so that CUDA is not initialised too early."""
    return lambda inspect: inspect()


def with_fork_context(choose_context: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: CoreContext() if os.environ.get(START_METHOD_VARIABLE) == "fork" else choose_context()


class _ForkedProcess(ForkProcess):
    """A process forked by a new thread, which becomes the main thread of the fork."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  multiprocessing's name
        forked: list[Any] = []  # the process, unless forking failed
        thread = threading.Thread(target=lambda: forked.append(ForkProcess._Popen(process_obj)))
        thread.start()
        thread.join()
        if not forked:
            raise OSError("the engine core could not be forked: see the error above")
        return forked[0]


class CoreContext(ForkContext):
    """Multiprocessing context whose forks can use OpenMP even if the parent process has used it."""

    Process = _ForkedProcess


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's single-process executor under a new name, because vLLM's CPU platform replaces the original.

    vLLM's worker on CPUs is a second process, and each process polls a shared buffer while the other computes. With
    few cores this starves everything else; even kernel threads waited for seconds. This executor does not poll.
    """

    def _init_executor(self) -> None:
        patches.check(patches.CPU_CORE)
        self._is_team_bound = bind_team()
        super()._init_executor()

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        with on_first_core(is_team_bound=self._is_team_bound):
            return super().collective_rpc(*args, **kwargs)


def bind_team() -> bool:
    """Bind each thread of the caller's OpenMP team, except the caller, to its own core; call before any computation.

    Return whether the threads are bound; they are not if the team does not have exactly one thread per core. The
    threads spin at barriers. If another process took a core and two threads shared one, a token would take seconds.
    """
    cores = sorted(os.sched_getaffinity(0))
    if torch.get_num_threads() != len(cores):
        return False
    before = _thread_ids()
    torch.ones(PARALLEL_ELEMENTS).exp_()  # a parallel operation starts the team
    others = sorted(_thread_ids() - before)
    if len(others) != len(cores) - 1:
        log.warning("cannot bind the model's threads to cores: found %d of %d threads", len(others) + 1, len(cores))
        return False
    for thread_id, core in zip(others, cores[1:], strict=True):
        os.sched_setaffinity(thread_id, {core})
    return True


def _thread_ids() -> set[int]:
    return {int(entry.name) for entry in THREADS_FOLDER.iterdir()}


@contextmanager
def on_first_core(*, is_team_bound: bool) -> Iterator[None]:
    """Keep the caller on the core that a bound team leaves free; threads started outside the block stay unbound."""
    cores = os.sched_getaffinity(0)
    if is_team_bound:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        if is_team_bound:
            os.sched_setaffinity(0, cores)


def without_amx(choose: Callable[..., str]) -> Callable[..., str]:
    """Compute attention with AVX-512 on CPUs with AMX: vLLM's AMX kernel uses threads with unconfigured tiles.

    If a model has as many key heads as query heads, a prompt of one token would kill the engine with SIGILL.
    """

    def choose_without_amx(*args: Any, **kwargs: Any) -> str:
        isa = choose(*args, **kwargs)
        return "vec" if isa == "amx" else isa

    return choose_without_amx


class _RestartingGenerator(torch.Generator):
    """A CPU generator whose `set_offset` restarts it from its seed, whatever the offset.

    vLLM samples after each step of a prompt, then moves the generator's offset back to undo the draw. CPU generators
    have no offset, so a seeded request whose prompt takes several steps would end the engine. Limitation: an answer
    that is preempted midway draws the same numbers twice.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.manual_seed(self.initial_seed())


def with_restarting_generator(initialise: Callable[[Any], None]) -> Callable[[Any], None]:
    def initialise_with_generator(state: Any) -> None:
        initialise(state)
        if state.generator is not None:
            state.generator = _RestartingGenerator().manual_seed(state.generator.initial_seed())

    return initialise_with_generator
