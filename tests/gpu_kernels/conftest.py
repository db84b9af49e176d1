"""Runs each test of this folder in a process where Triton interprets kernels for GPUs, or compiles them, without a GPU.

With a GPU they run on it. vLLM's build for CPUs switches Triton off, so Triton is put in its place before vLLM imports
its kernels.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from inspect import signature
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from tests.gpu_kernels.card import register

SPLITS = 2  # of H_in, whose products a kernel adds up; vLLM's 64 take the interpreter 7 s a step


@cache
def process(*, interprets: bool) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _interpret if interprets else _switch_triton_on)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if torch.cuda.is_available():
        return None
    given = {name: pyfuncitem.funcargs[name] for name in signature(pyfuncitem.obj).parameters}
    in_process = process(interprets=getattr(pyfuncitem.module, "INTERPRETED", True))
    in_process.submit(_run, pyfuncitem.obj.__module__, pyfuncitem.obj.__name__, given).result()
    return True


def _switch_triton_on() -> None:
    import triton
    import triton.language
    import vllm.triton_utils

    replaced: Any = vllm.triton_utils
    replaced.HAS_TRITON, replaced.triton, replaced.tl = True, triton, triton.language


def _interpret() -> None:
    register()
    os.environ["TRITON_INTERPRET"] = "1"
    _switch_triton_on()
    from vllm.lora.ops.triton_ops import lora_shrink_op as shrink

    configured = shrink.get_lora_op_configs
    shrink.get_lora_op_configs = lambda *given, **how: {**configured(*given, **how), "split_k": SPLITS}


def _run(module: str, test: str, given: dict[str, Any]) -> None:
    getattr(import_module(module), test)(**given)
