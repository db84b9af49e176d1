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
    """The engine core is a fork of the API process, which need not import all of vLLM again; ranks are spawned.

    vLLM can fork its core, and starts no thread before. But its CPU platform insists on spawning, for two reasons. It
    preloads libraries into the core: here the whole engine has them from its start (`command.py`). And a process that
    has computed cannot compute in a fork, where OpenMP waits for threads that are not there: but its teams belong to
    threads, so a thread without one forks (`CoreContext`).

    A tiny model is served after 10.6 seconds of CPU time instead of 24.3, in 0.3 GiB less (two cores, vLLM 0.32).
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
    """CPUs with AMX compute attention with AVX-512.

    vLLM's AMX kernel runs `tilezero` on threads whose tiles were never configured: with a model that has as many key
    heads as query heads, a prompt of one token kills the engine with SIGILL.
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
    """Requests' generators take back draws, as vLLM asks of them.

    A prompt that is read in several steps is sampled at the end of each, and vLLM takes back all draws but the last by
    moving the generator's offset. CPU generators have none: a request with a seed and a temperature whose prompt does
    not fit into a step beside others ends the engine. Nothing that counts was drawn before, so the generator begins
    again; an answer that made way for others midway draws the same numbers twice.
    """

    def settle_with_generator(state: Any) -> None:
        settle(state)
        if state.generator is not None:
            state.generator = _BeginningAgain().manual_seed(state.generator.initial_seed())

    return settle_with_generator
