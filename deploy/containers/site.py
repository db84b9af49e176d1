"""What compose has started: its containers, their health, and clients of its gateways."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.fleet.exercise.parts import Replacement, all_whole
from bench.rig.processes import children, command_line, descendants, wait_until
from deploy.containers.images import ENGINE_CPU, GATEWAY
from deploy.containers.tool import ROOT, ContainerError, Tool
from mta_client import Client
from server.supervisor.services import free_port

CPU = ("-f", "docker-compose.yml", "-f", "deploy/docker-compose.cpu.yml")
FLEET = ("--env-file", "deploy/fleet.env")
INITS = ("catatonit", "tini", "docker-init")
READY_S = 600.0
POLL_S, HEALTH_S = 0.5, 3.0
"""Seconds between two looks at the gateways, and between two rounds of health checks."""

NOTICED_S = 3.0
"""Seconds within which a gateway notices that a part is away: it looks every two."""

STORE = "redis"  # the service; an exercise calls it `valkey`
NEXT = "mta.check"  # label of images that replace others


@dataclass
class Site:
    """A deployment on free ports of loopback, in a compose project of its own: an exercise's `ReplaceableParts` and
    `RotatedParts`.

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
        while not all_whole(self):
            if time.monotonic() > deadline_s:
                said = self.compose("ps", "--all") + self.compose("logs", "--tail", 15)
                raise ContainerError(f"the gateways did not find all parts well in {READY_S:.0f} s\n{said}")
            time.sleep(POLL_S)

    def client(self, number: int = 0) -> Client:
        """Return a client of a gateway, with the operator's key."""
        return Client(self.urls[number], key=self.key, timeout_s=300)

    def container(self, name: str) -> str:
        """Return the name of a part's container."""
        return f"{self.project}-{STORE if name == 'valkey' else name}-1"

    def inspected(self, name: str, what: str) -> str:
        """Return a field of a part's container, by a Go template."""
        return self.tool.run("inspect", "--format", what, self.container(name)).strip()

    @property
    def names(self) -> Sequence[str]:
        pairs = [f"{kind}{number}" for kind in ("engine", "worker", "gateway") for number in ("", "-2")]
        return [*pairs, "router", "valkey"] if self.fleet else ["engine", "worker", "gateway", "valkey"]

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def secret(self) -> str:
        return self.settings["MTA_SECRET"]

    def pid(self, name: str) -> int:
        """Return the pid of a container's program on this machine, and not of the init before it; 0 if it is down."""
        pid = int(self.inspected(name, "{{.State.Pid}}"))
        try:
            is_init = bool(pid) and any(init in command_line(pid).partition(" ")[0] for init in INITS)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return 0
        return next(iter(children(pid)), 0) if is_init else pid

    def processes(self, name: str) -> list[int]:
        pid = self.pid(name)
        assert pid, f"{name} does not run"
        return [pid, *descendants(pid)]

    def kill(self, name: str) -> None:
        """Kill a container's program, as the kernel does when memory runs out."""
        before, *_ = self.processes(name)
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: self.pid(name) not in (0, before), f"{name} to be started again", READY_S)
        time.sleep(NOTICED_S)

    def command(self, *words: str) -> str:
        return self.compose("exec", "-T", "gateway", "mta", *words).strip()

    def with_secret(self, secret: str) -> Iterator[Replacement]:
        self.settings["MTA_SECRET"] = secret
        yield Replacement("gateway", "with another secret", self.start)

    def make_next_images(self) -> None:
        """Give the images' names to other ones, with a label more."""
        for image in (GATEWAY, ENGINE_CPU):
            file = self.folder / "next.Dockerfile"
            file.write_text(f'FROM {image}\nLABEL {NEXT}="{self.project}"\n', "utf-8")
            self.tool.run("build", "--file", file.resolve(), "--tag", image, self.folder.resolve())

    def of_old_images(self) -> list[str]:
        """Return the parts that do not run an image of `make_next_images`, except the store."""
        label = f'{{{{index .Config.Labels "{NEXT}"}}}}'
        return [name for name in self.names if name != "valkey" and self.inspected(name, label) != self.project]

    def replacements(self) -> Iterator[Replacement]:
        page = (ROOT / "docs" / "deploying.md").read_text("utf-8")
        found = re.search(r"for part in ([\w -]+); do", page)
        assert found, "deploying.md names no parts"
        gateways = dict(zip(("gateway", "gateway-2"), self.urls, strict=True))
        self.compose("run", "--rm", "models")
        for name in found[1].split():
            up = partial(self.compose, "up", "-d", "--no-deps", "--wait", name)
            yield Replacement(name, "", up, closed_url=gateways.get(name, ""))


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
