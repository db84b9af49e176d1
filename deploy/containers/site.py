"""What compose has started: its containers, their health, and clients of its gateways."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.fleet.machine import is_whole
from bench.rig.processes import children, command_line, wait_until
from deploy.containers.tool import ContainerError, Tool
from mta_client import Client
from server.supervisor.services import free_port

CPU = ("-f", "docker-compose.yml", "-f", "deploy/docker-compose.cpu.yml")
FLEET = ("--env-file", "deploy/fleet.env")
INITS = ("catatonit", "tini", "docker-init")
READY_S = 600.0
POLL_S, HEALTH_S = 0.5, 3.0
"""Seconds between two looks at the gateways, and between two rounds of health checks."""


@dataclass
class Site:
    """A deployment on free ports of loopback, in a compose project of its own.

    Attributes:
        tool: what runs its containers.
        folder: folder for its env file.
        bank: the bank's folder, readable by all.
        fleet: whether there are two of each.
        model: folder of the base model; by default the packaged one.
    """

    tool: Tool
    folder: Path
    bank: Path
    fleet: bool = False
    model: Path | None = None
    key: str = field(default_factory=lambda: f"mta_{secrets.token_hex(32)}")
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._options = [*CPU, *self._own_model()]
        self.ports = [free_port() for _ in range(2 if self.fleet else 1)]
        self.settings |= {
            "MTA_SECRET": secrets.token_hex(32),
            "MTA_ENGINE_KEY": secrets.token_hex(32),
            "MTA_FIRST_KEY": self.key,
            "MTA_BANK_DIR": str(self.bank.resolve()),
            "MTA_PORT": str(self.ports[0]),
            "MTA_PORT_2": str(self.ports[-1]),
        }

    def _own_model(self) -> list[str]:
        """Write a compose file of our own, as deploying.md says, if the model is a folder of this machine."""
        if self.model is None:
            return []
        self.settings["MTA_MODEL"] = "/model"
        mount = {"type": "bind", "source": str(self.model.resolve()), "target": "/model", "read_only": True}
        names = ("models", *(f"{kind}{number}" for kind in ("engine", "worker", "gateway") for number in ("", "-2")))
        services = {name: {"volumes": [mount]} for name in names if self.fleet or not name.endswith("-2")}
        file = self.folder / "model.json"
        file.write_text(json.dumps({"services": services}), "utf-8")
        return ["-f", str(file.resolve())]

    @property
    def project(self) -> str:
        """Name of the compose project."""
        return f"mta-check-{self.ports[0]}"

    @property
    def urls(self) -> list[str]:
        """The gateways' URLs."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def compose(self, *arguments: object) -> str:
        """Run one compose command on this deployment, with the env files that deploying.md names."""
        own = self.folder / ".env"
        own.touch(mode=0o600)
        own.write_text("".join(f"{name}={value}\n" for name, value in self.settings.items()), "utf-8")
        named = ("--project-name", self.project, "--env-file", own.resolve(), *(FLEET if self.fleet else ()))
        return self.tool.compose(*named, *self._options, *arguments)

    def start(self) -> float:
        """Start everything; return the seconds until each gateway was ready."""
        start_s = time.monotonic()
        self.compose("up", "-d")
        self.wait()
        return time.monotonic() - start_s

    def wait(self) -> None:
        """Wait until each gateway finds all its parts well."""
        deadline_s = time.monotonic() + READY_S
        while not all(map(self.whole, self.urls)):
            if time.monotonic() > deadline_s:
                said = self.compose("ps", "--all") + self.compose("logs", "--tail", 15)
                raise ContainerError(f"the gateways did not find all parts well in {READY_S:.0f} s\n{said}")
            time.sleep(POLL_S)

    def client(self, number: int = 0) -> Client:
        """Return a client of a gateway, with the operator's key."""
        return Client(self.urls[number], key=self.key, timeout_s=300)

    def container(self, service: str) -> str:
        """Return the name of a service's container."""
        return f"{self.project}-{service}-1"

    def inspected(self, service: str, what: str) -> str:
        """Return a field of a container, by a Go template."""
        return self.tool.run("inspect", "--format", what, self.container(service)).strip()

    def pid(self, service: str) -> int:
        """Return the pid of a container's program on this machine, and not of the init before it; 0 if it is down."""
        pid = int(self.inspected(service, "{{.State.Pid}}"))
        try:
            is_init = bool(pid) and any(name in command_line(pid).partition(" ")[0] for name in INITS)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return 0
        return next(iter(children(pid)), 0) if is_init else pid

    def kill(self, service: str) -> None:
        """Kill a container's program, as the kernel does when memory runs out, and wait until it runs again."""
        before = self.pid(service)
        assert before, f"{service} does not run"
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: self.pid(service) not in (0, before), f"{service} to be started again", READY_S)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a request with the operator's key."""
        return {"Authorization": f"Bearer {self.key}"}

    def whole(self, url: str) -> bool:
        """Whether a gateway finds all its parts well."""
        return is_whole(url, self.headers)


@contextmanager
def healthy(site: Site) -> Iterator[None]:
    """Run the containers' health checks within the block if nobody else does: Podman leaves them to systemd."""
    if not site.tool.is_podman or Path("/run/systemd/system").exists():
        yield
        return
    ended = threading.Event()

    def check() -> None:
        while not ended.wait(HEALTH_S):
            listed = site.tool.run("ps", "--format", "{{.Names}} {{.Status}}").splitlines()
            for line in listed:
                if line.startswith(site.project) and line.endswith(("(starting)", "(healthy)", "(unhealthy)")):
                    _checked(site.tool, line.split()[0])

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _checked(tool: Tool, name: str) -> None:
    """Run one health check; a container that is not well, or gone by now, is compose's affair."""
    with suppress(ContainerError):
        tool.run("healthcheck", "run", name)


@contextmanager
def deployed(site: Site) -> Iterator[Site]:
    """Remove the deployment and its volumes at the end of the block."""
    with healthy(site):
        try:
            yield site
        finally:
            site.compose("--profile", "fleet", "--profile", "observe", "down", "--volumes", "--timeout", 5)
