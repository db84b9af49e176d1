"""Two faults of vLLM 0.32 on CPU, mended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine import patches


def install() -> None:
    patches.replace(patches.CPU_ATTENTION, attention_off_amx)
    patches.replace(patches.CPU_SEEDS, seeds_that_begin_again)


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

    A prompt that is read in several steps is sampled at the end of each, and what is drawn before the last is taken
    back by moving the generator's offset. Generators on CPU have none: a request with a seed and a temperature whose
    prompt does not fit into a step beside others ends the engine. Nothing that counts was drawn before, so the
    generator begins again; an answer that made way for others midway draws the same numbers twice.
    """

    def settle_with_generator(state: Any) -> None:
        settle(state)
        if state.generator is not None:
            state.generator = _BeginningAgain().manual_seed(state.generator.initial_seed())

    return settle_with_generator
