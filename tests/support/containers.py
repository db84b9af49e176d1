"""The containers that compose and kustomize make of this repository's files, and how they run here as processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.rig.processes import Background, running, wait_until
from server.supervisor.services import free_port

ROOT = Path(__file__).parents[2]
BASE, CPU, FLEET = "docker-compose.yml", "deploy/docker-compose.cpu.yml", "deploy/fleet.env"
SECRETS = {"MTA_SECRET": "s" * 32, "MTA_ENGINE_KEY": "k" * 32}
FIRST_KEY = f"mta_{hashlib.sha256(b'a first key').hexdigest()}"
WORKLOADS = ("CronJob", "Deployment", "Job", "StatefulSet")
REDIS_URL = "redis://valkey:6379/0"
PORTS = ("6379", "8000", "8001", "8002", "9093", "9100", "29000")  # where containers listen, in commands and variables
PATIENCE_S = 240.0
_LOOPBACK = ("127.0.0.1", "localhost")
_NOWHERE = "/proc/none"  # where nobody can write, whoever they are
_ALONE = ("unshare", "--mount")  # what the command after it mounts, it alone sees
_READ_ONLY = "mount -o remount,bind,ro /"


@cache
def compose_command() -> tuple[str, ...]:
    for command in (("docker-compose",), ("docker", "compose")):
        found = shutil.which(command[0])
        if found and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("docker compose is not installed (Debian: apt-get install docker-compose)")


def config(files: tuple[str, ...], environment: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    given = [option for file in files for option in ("-f", file)]
    own = () if "--env-file" in options else ("--env-file", "/dev/null")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MTA_", "COMPOSE_"))}
    command = [*compose_command(), *given, *own, *options, "config", "--format", "json"]
    return subprocess.run(command, env=clean | dict(environment), cwd=ROOT, capture_output=True, text=True, check=False)


def services(files: tuple[str, ...], bank: Path, *options: str, **environment: str) -> dict[str, dict[str, Any]]:
    """The services as compose reads them, every variable filled in."""
    done = config(files, SECRETS | {"MTA_BANK_DIR": str(bank), "MTA_FIRST_KEY": FIRST_KEY} | environment, *options)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, dict[str, Any]] = json.loads(done.stdout)["services"]
    return parsed


@cache
def manifests(overlay: str) -> tuple[dict[str, Any], ...]:
    if not shutil.which("kustomize"):
        pytest.skip("kustomize is not installed (Debian: apt-get install kustomize)")
    folder = ROOT / "deploy" / "k8s" / "overlays" / overlay
    built = subprocess.run(["kustomize", "build", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


Probe = str | tuple[str, ...]
"""A URL that answers 200, or a command that ends with 0, if a container is well."""


@dataclass(frozen=True)
class Container:
    command: list[str]
    environment: dict[str, str]  # with what it refers to filled in
    hosts: tuple[str, ...]  # the names by which others reach it
    mounts: dict[str, bool]  # where folders are mounted; true where it may write
    locked: bool  # whether it may write nowhere else
    probes: dict[str, Probe]  # by their names in the file
    written: dict[str, Any] = field(repr=False)  # as the file has it
    pod: dict[str, Any] = field(repr=False)  # the pod's specification


def composed(files: tuple[str, ...], bank: Path, *options: str, **environment: str) -> dict[str, Container]:
    found = {}
    for name, written in services(files, bank, *options, **environment).items():
        networks = [network or {} for network in written.get("networks", {}).values()]
        check = written.get("healthcheck", {}).get("test", ())
        assert not check or check[0] == "CMD"
        mounts = {one["target"]: not one.get("read_only") for one in written.get("volumes", ())}
        found[name] = Container(
            command=list(written["command"] or ()),
            environment={key: value for key, value in written.get("environment", {}).items() if value is not None},
            hosts=(name, *(alias for network in networks for alias in network.get("aliases", ()))),
            mounts=mounts | dict.fromkeys(written.get("tmpfs", ()), True),
            locked=bool(written.get("read_only")),
            probes={"healthcheck": tuple(check[1:])} if check else {},
            written=written,
            pod={},
        )
    return found


def containers(overlay: str) -> dict[str, Container]:
    documents = manifests(overlay)
    shared = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
    found = {}
    for workload in (one for one in documents if one["kind"] in WORKLOADS):
        pod, hosts = template_of(workload)["spec"], _hosts(workload, documents)
        for written in (*pod.get("initContainers", ()), *pod["containers"]):
            environment = {}
            for source in written.get("envFrom", ()):
                environment |= shared[source["configMapRef"]["name"]]
            for variable in written.get("env", ()):
                value = re.sub(r"\$\((\w+)\)", lambda name, known=environment: known[name[1]], _value(variable))
                environment[variable["name"]] = value
            found[written["name"]] = Container(
                command=[*written["command"], *written.get("args", ())],
                environment=environment,
                hosts=hosts if written in pod["containers"] else (),
                mounts={one["mountPath"]: not one.get("readOnly") for one in written.get("volumeMounts", ())},
                locked=written["securityContext"]["readOnlyRootFilesystem"],
                probes=dict(_probes(written)),
                written=written,
                pod=pod,
            )
    return found


def template_of(workload: dict[str, Any]) -> dict[str, Any]:
    """The template of its pods."""
    template: dict[str, Any] = workload["spec"].get("jobTemplate", workload)["spec"]["template"]
    return template


def _hosts(workload: dict[str, Any], documents: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """The services that lead to its pods; and the name of the first pod of a StatefulSet."""
    labels = template_of(workload)["metadata"]["labels"]
    leading = [one for one in documents if one["kind"] == "Service"]
    names = [one["metadata"]["name"] for one in leading if one["spec"]["selector"].items() <= labels.items()]
    first = f"{workload['metadata']['name']}-0"
    return (*names, *(f"{first}.{name}" for name in names if workload["kind"] == "StatefulSet"))


def _probes(written: dict[str, Any]) -> Iterator[tuple[str, Probe]]:
    ports = {port["name"]: port["containerPort"] for port in written.get("ports", ())}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        match written.get(kind):
            case {"httpGet": {"path": path, "port": port}}:
                yield kind, f"http://127.0.0.1:{ports[port]}{path}"
            case {"exec": {"command": command}}:
                yield kind, tuple(command)


def _value(variable: dict[str, Any]) -> str:
    match variable:
        case {"value": str(value)}:
            return value
        case {"valueFrom": {"secretKeyRef": {"name": "mta", "key": key}}}:
            kept = {"secret": SECRETS["MTA_SECRET"], "engine-key": SECRETS["MTA_ENGINE_KEY"], "redis-url": REDIS_URL}
            return (kept | {"first-key": FIRST_KEY})[key]
        case {"valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}:
            return "1"
        case {"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
            return "gateway"  # no other pod asks for its name
    raise AssertionError(f"nobody knows what {variable} is")


def with_hosts(text: str, here: Callable[[str, str], str]) -> str:
    """A text with each `host:port` of a URL replaced by what `here` makes of host and port."""
    return re.sub(r"//([\w.-]+):(\d+)", lambda found: f"//{here(found[1], found[2])}", text)


@dataclass
class Site:
    """The containers of one deployment as processes on loopback; all end with the block.

    A process has only its container's variables. A locked one has no home, no temporary folder and, where this process
    may mount, a read-only file system but for its writable mounts. A host without a container is one that is down.
    `mounted` are folders here by their paths in containers, `programs` those with other names on this machine;
    `settings` override each container's variables.
    """

    folder: Path
    containers: dict[str, Container]
    mounted: dict[str, Path]
    programs: Path
    settings: dict[str, str]
    before: dict[str, dict[str, bool]] = field(default_factory=dict)  # what probes found before a container's start
    _ports: dict[tuple[str, str], str] = field(default_factory=dict)
    _processes: dict[str, Background] = field(default_factory=dict)
    _running: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def port(self, name: str, port: str) -> str:
        return self._ports.setdefault((name, port), str(free_port()))

    def named(self, host: str) -> list[str]:
        return [name for name, container in self.containers.items() if host in container.hosts]

    def environment(self, name: str) -> dict[str, str]:
        container, home = self.containers[name], _made(self.folder / name / "home")
        programs = [str(self.programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        shared = {"PATH": os.pathsep.join(programs), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        shared["HOME"] = _NOWHERE if container.locked else str(home)
        shared["TMPDIR"] = str(self._place(name, "/tmp") or shared["HOME"])
        written = {key: self._here(name, value) for key, value in container.environment.items()}
        return shared | written | self.settings

    def once(self, name: str, command: list[str] | None = None) -> str:
        """Run a container that ends by itself, or another command in it; what it prints."""
        walled, where = self._command(name, command or self.containers[name].command), self._desk(name)
        done = subprocess.run(
            walled, env=self.environment(name), cwd=where, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        return done.stdout

    def start(self, *names: str, options: tuple[str, ...] = ()) -> None:
        """Start containers, with further options, and return once all their probes find them well."""
        for name in names:
            self.before[name] = self.probed(name)
        for name in names:
            command = [*self._command(name, self.containers[name].command), *options]
            environment: dict[str, str | None] = dict.fromkeys(os.environ)
            self._processes[name] = self._running.enter_context(
                running(command, environment | self.environment(name), self._desk(name))
            )
        for name in names:
            try:
                wait_until(lambda name=name: self._well(name), f"{name} to be well", PATIENCE_S)  # type: ignore[misc]
            except AssertionError as error:
                said = [f"== {other}\n{self._processes[other].output[-2000:]}" for other in names]
                raise AssertionError("\n".join([str(error), *said])) from None

    def probed(self, name: str) -> dict[str, bool]:
        return {kind: self._passes(name, probe) for kind, probe in self.containers[name].probes.items()}

    def trespasses(self) -> list[Path]:
        """What containers have written into their working folders, which belong to the image."""
        return [path for name in self.containers for path in (self.folder / name / "desk").glob("*")]

    def _well(self, name: str) -> bool:
        ended = [other for other, process in self._processes.items() if process.process.poll() is not None]
        assert not ended, f"{ended} ended"
        ours = [port for (owner, _), port in self._ports.items() if owner == name]
        # Probes are processes of their own, and what starts needs the cores.
        return any(map(_listens, ours)) and all(self.probed(name).values())

    def _passes(self, name: str, probe: Probe) -> bool:
        if isinstance(probe, str):
            with suppress(httpx.TransportError):
                return httpx.get(self._here(name, probe), timeout=5).status_code == httpx.codes.OK
            return False
        command = [self._here(name, word) for word in probe]
        done = subprocess.run(command, env=self.environment(name), capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    def _command(self, name: str, words: list[str]) -> list[str]:
        """A container's command, for which only what its container mounts so can be written."""
        container, command = self.containers[name], [self._here(name, word) for word in words]
        if not (container.locked and _can_mount()):
            return command
        kept = [shlex.quote(str(self._place(name, path))) for path, writable in container.mounts.items() if writable]
        walls = [*(f"mount --bind {place} {place}" for place in kept), _READ_ONLY, 'exec "$@"']
        return [*_ALONE, "sh", "-c", " && ".join(walls), "sh", *command]

    def _here(self, name: str, word: str) -> str:
        """A word of a container's command or environment, as it is on this machine."""
        if word in PORTS:
            return self.port(name, word)
        if word == "0.0.0.0":
            return _LOOPBACK[0]
        word = with_hosts(word, lambda host, port: f"{_LOOPBACK[0]}:{self._reached(name, host, port)}")
        mounts = "|".join(map(re.escape, self.containers[name].mounts)) or "(?!)"
        return re.sub(rf"(?:^|(?<==))(?:{mounts})(?=/|$)", lambda found: str(self._place(name, found[0])), word)

    def _reached(self, name: str, host: str, port: str) -> str:
        if host in _LOOPBACK:
            return self.port(name, port)
        return next((self.port(other, port) for other in self.named(host)), str(free_port()))

    def _place(self, name: str, path: str) -> Path | None:
        if path not in self.containers[name].mounts:
            return None
        own = self.folder / name / "mounts" / path.strip("/").replace("/", "-")
        return self.mounted.get(path) or _made(own)

    def _desk(self, name: str) -> Path:
        return _made(self.folder / name / "desk")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _can_mount() -> bool:
    return subprocess.run([*_ALONE, "sh", "-c", _READ_ONLY], capture_output=True, check=False).returncode == 0


def _listens(port: str) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((_LOOPBACK[0], int(port))) == 0
