"""What vLLM 0.32 does otherwise on CPUs than an engine needs: how its core starts, AMX attention, seeds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import torch

from server.engine import patches

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def install() -> None:
    patches.replace(patches.CPU_CONFIG, forking)
    patches.replace(patches.CPU_CONTEXT, choosing)
    patches.replace(patches.CPU_ATTENTION, attention_off_amx)
    patches.replace(patches.CPU_SEEDS, seeds_that_begin_again)


def forking(settle: Callable[[Any], None]) -> Any:
    """The engine core is a fork, which need not import vLLM again: 10.6 s of CPU time for a tiny model, not 24.3.

    vLLM's CPU platform insists on spawning it, to preload libraries into it, which the whole engine has here from its
    start (`command.py`), and because a process that has computed cannot compute in a fork, where OpenMP waits for
    threads that are not there. But its teams belong to threads: one without a team forks (`CoreContext`).
    """

    def settle_but_fork(config: Any) -> None:
        settle(config)
        if config.parallel_config.world_size == 1:
            os.environ[METHOD] = "fork"

    return staticmethod(settle_but_fork)


def choosing(choose_context: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: CoreContext() if os.environ.get(METHOD) == "fork" else choose_context()


class _ForkedProcess(ForkProcess):
    """A process forked by a thread made for that; in the fork it is the main thread."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  multiprocessing's name
        started: list[Any] = []
        thread = threading.Thread(target=lambda: started.append(ForkProcess._Popen(process_obj)))
        thread.start()
        thread.join()
        if not started:
            raise OSError("the engine core could not be forked: the lines above say why")
        return started[0]


class CoreContext(ForkContext):
    """How multiprocessing makes processes that may compute, in a process that has computed."""

    Process = _ForkedProcess


def attention_off_amx(choose: Callable[..., str]) -> Callable[..., str]:
    """CPUs with AMX compute attention with AVX-512: vLLM's AMX kernel uses threads whose tiles were never configured.

    With a model that has as many key heads as query heads, a prompt of one token kills the engine with SIGILL.
    """

    def choose_but_amx(*args: Any, **kwargs: Any) -> str:
        isa = choose(*args, **kwargs)
        return "vec" if isa == "amx" else isa

    return choose_but_amx


class _BeginningAgain(torch.Generator):
    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.manual_seed(self.initial_seed())


def seeds_that_begin_again(settle: Callable[[Any], None]) -> Callable[[Any], None]:
    """Requests' generators take back draws, by beginning again.

    vLLM samples at the end of each step that reads a prompt, and moves the generator's offset back. CPU generators have
    none: a seeded request whose prompt takes several steps ends the engine. An answer that made way for others midway
    draws the same numbers twice.
    """

    def settle_with_generator(state: Any) -> None:
        settle(state)
        if state.generator is not None:
            state.generator = _BeginningAgain().manual_seed(state.generator.initial_seed())

    return settle_with_generator
