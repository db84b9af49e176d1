"""Containers as processes of this machine: ports are free ones, host names loopback, mounted folders temporary ones."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import httpx

from bench.rig.processes import Background, running, wait_until
from server.supervisor.services import free_port
from tests.support.containers import ROOT, Container, Probe, with_hosts

PORTS = ("6379", "8000", "8001", "8002", "9093", "9100", "29000")
"""Where containers listen, as their commands and variables say it."""

PATIENCE_S = 240.0
_LOOPBACK = ("127.0.0.1", "localhost")
_NOWHERE = "/proc/none"  # where nobody can write, whoever they are
_ALONE = ("unshare", "--mount")  # what the command after it mounts, it alone sees
_READ_ONLY = "mount -o remount,bind,ro /"


class Site:
    """Where the containers of one deployment run; a context manager that ends them all.

    A process heeds of a container's walls what it can: it has no variables but its own, and if it may write only to
    what is mounted, it has neither a home nor a folder for temporary files. Where this process may mount, all the rest
    is read-only to it; `trespasses` says what was written into working folders.

    They write to `folder`. A host name that no container has is of one that is down. `mounted` are folders here by
    their paths in containers; what is mounted elsewhere is empty, and each one's own. `programs` holds those that this
    machine has under other names, and `settings` go on top of each container's own variables.
    """

    def __init__(
        self,
        folder: Path,
        containers: Mapping[str, Container],
        *,
        mounted: Mapping[str, Path],
        programs: Path,
        settings: dict[str, str],
    ) -> None:
        self.folder = folder
        self.containers = dict(containers)
        self.before: dict[str, dict[str, bool]] = {}
        self._mounted = dict(mounted)
        self._path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self._settings = settings
        self._ports: dict[tuple[str, str], str] = {}
        self._processes: dict[str, Background] = {}
        self._running = ExitStack()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def port(self, name: str, port: str) -> str:
        """The port here that stands for a container's own."""
        return self._ports.setdefault((name, port), str(free_port()))

    def named(self, host: str) -> list[str]:
        """The containers that a host name leads to."""
        return [name for name, container in self.containers.items() if host in container.hosts]

    def mount(self, path: str, here: Path) -> None:
        """Have containers find this at a path."""
        self._mounted[path] = here

    def environment(self, name: str) -> dict[str, str]:
        """All variables of a container's process."""
        container, home = self.containers[name], self.folder / name / "home"
        home.mkdir(parents=True, exist_ok=True)
        shared = {"PATH": self._path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        shared["HOME"] = _NOWHERE if container.locked else str(home)
        shared["TMPDIR"] = str(self._place(name, "/tmp") or shared["HOME"])
        written = {key: self._here(name, value) for key, value in container.environment.items()}
        return shared | written | self._settings

    def once(self, name: str, command: list[str] | None = None) -> str:
        """Run a container that ends by itself, or another command in it; what it prints."""
        done = subprocess.run(
            self._walled(name, self._all_here(name, command or self.containers[name].command)),
            env=self.environment(name),
            cwd=self._desk(name),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        return done.stdout

    def start(self, *names: str, options: tuple[str, ...] = ()) -> None:
        """Start containers, with further options, and return once all their probes find them well."""
        for name in names:
            self.before[name] = self.probed(name)
        for name in names:
            command = self._walled(name, [*self._all_here(name, self.containers[name].command), *options])
            environment: dict[str, str | None] = dict.fromkeys(os.environ)
            self._processes[name] = self._running.enter_context(
                running(command, environment | self.environment(name), self._desk(name))
            )
        for name in names:
            wait_until(lambda name=name: self._well(name), f"{name} to be well", PATIENCE_S)  # type: ignore[misc]

    def probed(self, name: str) -> dict[str, bool]:
        """What each of a container's probes finds."""
        return {kind: self._passes(name, probe) for kind, probe in self.containers[name].probes.items()}

    def trespasses(self) -> list[Path]:
        """What containers have written into their working folders: of the images, these are not theirs."""
        return [path for name in self.containers for path in (self.folder / name / "desk").glob("*")]

    def _well(self, name: str) -> bool:
        process = self._processes[name]
        assert process.process.poll() is None, f"{name} ended:\n{process.output}"
        ours = [port for (owner, _), port in self._ports.items() if owner == name]
        # Probes are processes of their own, and what starts needs the cores.
        return any(map(_listens, ours)) and all(self.probed(name).values())

    def _passes(self, name: str, probe: Probe) -> bool:
        if probe.url:
            try:
                return httpx.get(self._here(name, probe.url), timeout=5).status_code == httpx.codes.OK
            except httpx.TransportError:
                return False
        command = self._all_here(name, list(probe.command))
        done = subprocess.run(command, env=self.environment(name), capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    def _all_here(self, name: str, words: list[str]) -> list[str]:
        return [self._here(name, word) for word in words]

    def _walled(self, name: str, command: list[str]) -> list[str]:
        """A command for which nothing can be written but what its container mounts so."""
        container = self.containers[name]
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
        """What is mounted at a path; None if nothing is."""
        if path not in self.containers[name].mounts:
            return None
        if path not in self._mounted:
            own = self.folder / name / "mounts" / path.strip("/").replace("/", "-")
            own.mkdir(parents=True, exist_ok=True)
            return own
        return self._mounted[path]

    def _desk(self, name: str) -> Path:
        """The working folder, in which there is nothing to be written."""
        desk = self.folder / name / "desk"
        desk.mkdir(parents=True, exist_ok=True)
        return desk


@cache
def _can_mount() -> bool:
    return subprocess.run([*_ALONE, "sh", "-c", _READ_ONLY], capture_output=True, check=False).returncode == 0


def _listens(port: str) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((_LOOPBACK[0], int(port))) == 0
