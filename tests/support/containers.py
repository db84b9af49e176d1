"""What docker compose and kustomize make of the files in this repository; neither needs a daemon or a cluster to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BASE, CPU, FLEET = "docker-compose.yml", "deploy/docker-compose.cpu.yml", "deploy/fleet.env"
SECRETS = {"MTA_SECRET": "s" * 32, "MTA_ENGINE_KEY": "k" * 32}
WORKLOADS = ("Deployment", "Job", "StatefulSet")
REDIS_URL = "redis://valkey:6379/0"


def compose_command() -> list[str]:
    """`docker compose`, as a plugin or by itself."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    pytest.skip("docker compose is not installed (Debian: apt-get install docker-compose)")


def config(files: tuple[str, ...], environment: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """`docker compose config` with these variables and no others of ours."""
    given = [option for file in files for option in ("-f", file)]
    own = () if "--env-file" in options else ("--env-file", "/dev/null")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MTA_", "COMPOSE_"))}
    return subprocess.run(
        [*compose_command(), *given, *own, *options, "config", "--format", "json"],
        env=clean | dict(environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def services(files: tuple[str, ...], bank: Path, *options: str, **environment: str) -> dict[str, dict[str, Any]]:
    """The services as compose reads them, every variable filled in."""
    done = config(files, SECRETS | {"MTA_BANK_DIR": str(bank)} | environment, *options)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, dict[str, Any]] = json.loads(done.stdout)["services"]
    return parsed


@cache
def manifests(overlay: str) -> tuple[dict[str, Any], ...]:
    """Everything that an overlay makes."""
    if not shutil.which("kustomize"):
        pytest.skip("kustomize is not installed (Debian: apt-get install kustomize)")
    folder = ROOT / "deploy" / "k8s" / "overlays" / overlay
    built = subprocess.run(["kustomize", "build", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


@dataclass(frozen=True)
class Container:
    """A container of a pod.

    Attributes:
        command: program and arguments.
        environment: with what it refers to filled in.
        written: as the manifest has it.
        pod: the pod's specification.
    """

    command: list[str]
    environment: dict[str, str]
    written: dict[str, Any]
    pod: dict[str, Any] = field(repr=False)


def containers(overlay: str) -> dict[str, Container]:
    """All containers by their names, those that run first included."""
    documents = manifests(overlay)
    shared = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
    found = {}
    for pod in (one["spec"]["template"]["spec"] for one in documents if one["kind"] in WORKLOADS):
        for written in (*pod.get("initContainers", ()), *pod["containers"]):
            environment = {}
            for source in written.get("envFrom", ()):
                environment |= shared[source["configMapRef"]["name"]]
            environment |= {variable["name"]: _value(variable) for variable in written.get("env", ())}
            found[written["name"]] = Container(written["command"], environment, written, pod)
    return found


def _value(variable: dict[str, Any]) -> str:
    match variable:
        case {"value": str(value)}:
            return value
        case {"valueFrom": {"secretKeyRef": {"name": "mta", "key": key}}}:
            kept = {"secret": SECRETS["MTA_SECRET"], "engine-key": SECRETS["MTA_ENGINE_KEY"], "redis-url": REDIS_URL}
            return kept[key]
        case {"valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}:
            return "2"
    raise AssertionError(f"nobody knows what {variable} is")


def with_hosts(text: str, here: Callable[[str, str], str]) -> str:
    """A text with each `host:port` of a URL replaced by what `here` makes of host and port."""
    return re.sub(r"//([\w.-]+):(\d+)", lambda found: f"//{here(found[1], found[2])}", text)
