"""Docker, or Podman behind a socket of its own."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import MtaError
from bench.rig.processes import running, wait_until

ROOT = Path(__file__).parents[2]
PODMAN = "podman buildah runc netavark aardvark-dns nftables catatonit fuse-overlayfs docker-compose"
"""Debian's packages with which Podman runs compose files."""

NO_TOOL = f"neither Docker nor Podman with docker-compose is here: apt-get install --no-install-recommends {PODMAN}"
_WALLED = "CONTAINERS_TEST_NETWORK"
MAX_OPEN_FILES = 1_048_576
"""Limit of open files that Podman asks for, whether or not this process may have it."""


class ContainerError(MtaError):
    """A command of Docker, Podman or compose failed, or none of them is installed."""


@dataclass(frozen=True, slots=True)
class Tool:
    """The command that builds images and runs containers, and the environment it needs."""

    name: str  # docker or podman
    environment: Mapping[str, str]

    @property
    def is_podman(self) -> bool:
        """Whether it is Podman, which needs us to run its health checks where there is no systemd."""
        return self.name == "podman"

    def run(self, *arguments: object, shown: bool = False) -> str:
        """Run one command and return its output; with `shown` it is printed instead.

        Raises:
            ContainerError: if it fails, with its messages.
        """
        return _run([self.name, *map(str, arguments)], self.environment, shown=shown)

    def compose(self, *arguments: object) -> str:
        """Run one compose command in this checkout and return its output; ContainerError if it fails."""
        clean = {name: value for name, value in self.environment.items() if not name.startswith(("MTA_", "COMPOSE_"))}
        command = [*compose_command(), *map(str, arguments)]
        return _run(command, clean | {"COMPOSE_PROGRESS": "plain"})

    def has_image(self, image: str) -> bool:
        """Whether an image is here."""
        return bool(self.run("images", "--quiet", image).strip())


def found_tool(folder: Path) -> Tool:
    """Return Docker if its daemon answers, otherwise Podman.

    Args:
        folder: folder for Podman's socket and settings.

    Raises:
        ContainerError: if neither can be used.
    """
    compose_command()
    if shutil.which("docker") and _answers(["docker", "info"]):
        return Tool("docker", dict(os.environ))
    if shutil.which("podman"):
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "containers.conf"
        settings.write_text(_podman_settings(), "utf-8")
        own = {
            "CONTAINERS_CONF_OVERRIDE": str(settings),
            "DOCKER_HOST": f"unix://{folder / 'podman.sock'}",
            "BUILDAH_ISOLATION": "chroot",
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
        }
        return Tool("podman", os.environ | own)
    raise ContainerError(NO_TOOL)


def enter_own_network(tool: Tool) -> None:
    """Start this program again in a network namespace of its own, where Podman's bridges, firewall rules and ports meet
    nobody else's. Docker's daemon has its own already, and other users than root may not."""
    if (
        not tool.is_podman
        or os.geteuid()
        or _WALLED in os.environ
        or not (shutil.which("unshare") and shutil.which("ip"))
    ):
        return
    again = [sys.executable, "-m", "deploy.containers", *sys.argv[1:]]
    walls = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    os.execvpe(walls[0], [*walls, *again], os.environ | {_WALLED: "1"})


@contextmanager
def served(tool: Tool) -> Iterator[None]:
    """Have the tool answer compose within the block: Podman does so on its socket, Docker always."""
    if not tool.is_podman:
        yield
        return
    socket = Path(tool.environment["DOCKER_HOST"].removeprefix("unix://"))
    socket.unlink(missing_ok=True)
    with running(["podman", "system", "service", "--time", "0", f"unix://{socket}"], dict(tool.environment)):
        wait_until(socket.exists, "Podman's socket")
        yield


def compose_command() -> tuple[str, ...]:
    """Return the command of compose 2; ContainerError if it is not installed."""
    for command in (("docker-compose",), ("docker", "compose")):
        if shutil.which(command[0]) and _answers([*command, "version"]):
            return command
    raise ContainerError("docker compose is not installed (Debian: apt-get install docker-compose)")


def _podman_settings() -> str:
    """What Podman must do otherwise here: containers get no higher limits than this process, and an old kernel's
    cgroups, which crun refuses, get runc."""
    limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    hard = {name: resource.getrlimit(number)[1] for name, number in limits.items()}
    ours = [f'"{name}={most}:{most}"' for name, most in hard.items() if 0 <= most < MAX_OPEN_FILES]
    lines = ["[containers]", f"default_ulimits = [{', '.join(ours)}]", "[engine]"]
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        lines.append('runtime = "runc"')
    if not Path("/run/systemd/system").exists():
        lines += ['cgroup_manager = "cgroupfs"', 'events_logger = "file"']
    return "\n".join([*lines, "compat_api_enforce_docker_hub = false", ""])


def _answers(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: Sequence[str], environment: Mapping[str, str], *, shown: bool = False) -> str:
    done = subprocess.run(
        command,
        env=dict(environment),
        cwd=ROOT,
        capture_output=not shown,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        said = "its messages are above" if shown else (done.stderr or done.stdout).strip()[-2000:]
        raise ContainerError(f"`{' '.join(command[:6])} …` ended with status {done.returncode}: {said}")
    return done.stdout or ""
