"""A running `mta up` and the processes of its parts, or a single running gateway."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.rig.engine import KEY
from bench.rig.processes import Background, children, command_line, mta, running
from mta_client import Client
from server.supervisor.services import free_port

READY = r"^Ready: (http://127\.0\.0\.1:\d+)"
LISTENING = r"listening on (http://\S+)"
START_S = 240.0
SECRET = "a secret of the benchmarks alone"
_KEPT = ("MTA_CACHE_DIR", "MTA_EMBEDDER")
_MARKS = {
    "valkey": "valkey-server",
    "engine": "server.engine ",
    "router": "vllm_router",
    "gateway": "server.cli gateway",
    "worker": "server.cli worker",
}


@dataclass(frozen=True, slots=True)
class Up:
    """A running `mta up`."""

    process: Background  # the process with its output
    url: str  # the gateway's URL
    data: Path  # its data folder

    @property
    def pid(self) -> int:
        """The pid of `mta up` itself."""
        return self.process.process.pid

    def part(self, name: str) -> int | None:
        """Return the pid of a part, the child of its guard, or None if it is not running. Engines: `engine-1`, …"""
        kind, _, number = name.partition("-")
        port = f"--port {self.address(name).rpartition(':')[2]} " if number else ""
        for guard in children(self.pid):
            with suppress(FileNotFoundError):  # the process has exited in the meantime
                command = command_line(guard)
                if "guard.py" in command and _MARKS[kind] in command and port in command:
                    return next(iter(children(guard)), None)
        return None

    def address(self, name: str) -> str:
        """Return the address of a part, from the output of `mta up`."""
        return self.process.wait_for(rf"^  {name} +starting +(\S+)")[1]

    def starts(self, name: str) -> int:
        """Return how often a part has become ready so far."""
        return len(re.findall(rf"^  {name} +ready ", self.process.output, re.MULTILINE))

    def client(self, timeout_s: float = 60) -> httpx.Client:
        """Return a client of the gateway."""
        return httpx.Client(base_url=self.url, timeout=timeout_s)

    def ready(self) -> bool:
        """Whether the gateway answers and reports every part as ready."""
        with Client(self.url, timeout_s=10) as client:
            return client.ready()


def cleared_settings() -> dict[str, str | None]:
    """Return an environment that clears the caller's settings, except the cache folder and the embedder: a bank must be
    served with the embedder that built it."""
    return {name: None for name in os.environ if name.startswith("MTA_") and name not in _KEPT}


def up_command(data: Path, *options: str) -> tuple[list[str], dict[str, str | None]]:
    """Return command and environment of `mta up`, with `cleared_settings`."""
    return mta("up", "--data", str(data), *options), cleared_settings()


@contextmanager
def up(data: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Up]:
    """Run `mta up` and wait until it is ready; it uses a free port unless the options name one."""
    command, clean = up_command(data, *(options if "--port" in options else ("--port", "0", *options)))
    with running(command, clean | dict(environment or {})) as process:
        yield Up(process, process.wait_for(READY, START_S)[1], data)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A single running gateway."""

    url: str
    pid: int


@contextmanager
def running_gateway(bank: Path, store_url: str, engine_url: str, **settings: object) -> Iterator[Gateway]:
    """Run a single gateway and wait until it listens; its engine has the key `KEY`, and may be absent."""
    given = {f"MTA_{name.upper()}": str(value) for name, value in settings.items()}
    environment = cleared_settings() | given | {"MTA_SECRET": SECRET, "MTA_ENGINE_KEY": KEY}
    options = ("--bank", str(bank), "--redis-url", store_url, "--engine-url", engine_url, "--port", str(free_port()))
    with running(mta("gateway", *options), environment) as process:
        yield Gateway(process.wait_for(LISTENING, START_S)[1], process.process.pid)
