"""Requests with a seed on CPU: draws that vLLM takes back, while a prompt is read in several steps."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from server.engine.cpu.mends import seeds_that_begin_again


def drawn(generator: torch.Generator) -> list[float]:
    return torch.empty(4).exponential_(generator=generator).tolist()


def state(generator: torch.Generator | None) -> CachedRequestState:
    made = CachedRequestState("r", [1, 2, 3], [], None, generator, ([0],), 0, [])
    seeds_that_begin_again(lambda state: None)(made)
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
