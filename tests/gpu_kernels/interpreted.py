"""vLLM's kernels for GPUs in a process of their own, where Triton interprets them: no GPU is needed.

vLLM's build for CPUs switches Triton off, so Triton is put in its place before vLLM imports its kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch

Stacks = tuple[torch.Tensor, ...]  # A or B over all slots, [S, 1, rows, columns], of each module of a layer


@contextmanager
def interpreter() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_switch_triton_on) as process:
        yield process


def _switch_triton_on() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language
    import vllm.triton_utils

    replaced: Any = vllm.triton_utils
    replaced.HAS_TRITON, replaced.triton, replaced.tl = True, triton, triton.language


def adapted(x: torch.Tensor, owners: Sequence[int], a: Stacks, b: Stacks, *, specialised: bool) -> torch.Tensor:
    """Return what a layer's adapters add to its output for rows x [N, H_in], [N, sum of H_out].

    `owners` has each row's slot, -1 for none. If `specialised`, kernels are launched for the adapters of the step
    alone, otherwise for as many as there are slots.
    """
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    slots, widths = len(a[0]), tuple(each.shape[2] for each in b)
    config = SimpleNamespace(max_loras=slots, specialize_active_lora=specialised)
    wrapper = PunicaWrapperGPU(len(owners), len(owners), "cpu", lora_config=config)
    ids = list(range(100, 100 + slots))
    mapping = tuple(ids[owner] if owner >= 0 else 0 for owner in owners)
    wrapper.update_metadata(LoRAMapping(mapping, mapping, is_prefill=True), ids, slots, 100)
    y = torch.zeros(len(owners), sum(widths), dtype=x.dtype)
    wrapper.add_lora_linear(y, x, a, b, 1.0, widths)
    return y
