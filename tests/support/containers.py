"""What docker compose and kustomize make of the files in this repository; neither needs a daemon or a cluster to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BASE, CPU, FLEET = "docker-compose.yml", "deploy/docker-compose.cpu.yml", "deploy/fleet.env"
SECRETS = {"MTA_SECRET": "s" * 32, "MTA_ENGINE_KEY": "k" * 32}
FIRST_KEY = f"mta_{hashlib.sha256(b'a first key').hexdigest()}"
WORKLOADS = ("Deployment", "Job", "StatefulSet")
REDIS_URL = "redis://valkey:6379/0"


@cache
def compose_command() -> tuple[str, ...]:
    """`docker compose`, as a plugin or by itself."""
    for command in (("docker-compose",), ("docker", "compose")):
        found = shutil.which(command[0])
        if found and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
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
    done = config(files, SECRETS | {"MTA_BANK_DIR": str(bank), "MTA_FIRST_KEY": FIRST_KEY} | environment, *options)
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
class Probe:
    """How to find out whether a container is well: a command that ends with 0, or a URL that answers 200."""

    command: tuple[str, ...] = ()
    url: str = ""


@dataclass(frozen=True)
class Container:
    """A container of a pod, or of a service of compose."""

    command: list[str]
    environment: dict[str, str]  # with what it refers to filled in
    hosts: tuple[str, ...]  # the names by which others reach it
    mounts: dict[str, bool]  # where folders are mounted; true where it may write
    locked: bool  # whether it may write nowhere else
    probes: dict[str, Probe]  # by their names in the file
    written: dict[str, Any] = field(repr=False)  # as the file has it
    pod: dict[str, Any] = field(repr=False)  # the pod's specification


def composed(files: tuple[str, ...], bank: Path, *options: str, **environment: str) -> dict[str, Container]:
    """The services of compose by their names."""
    return {name: _service(name, one) for name, one in services(files, bank, *options, **environment).items()}


def _service(name: str, written: dict[str, Any]) -> Container:
    networks = [network or {} for network in written.get("networks", {}).values()]
    check = written.get("healthcheck", {}).get("test", ())
    assert not check or check[0] == "CMD"
    return Container(
        command=list(written["command"] or ()),
        environment={key: value for key, value in written.get("environment", {}).items() if value is not None},
        hosts=(name, *(alias for network in networks for alias in network.get("aliases", ()))),
        mounts={one["target"]: not one.get("read_only") for one in written.get("volumes", ())}
        | dict.fromkeys(written.get("tmpfs", ()), True),
        locked=bool(written.get("read_only")),
        probes={"healthcheck": Probe(tuple(check[1:]))} if check else {},
        written=written,
        pod={},
    )


def containers(overlay: str) -> dict[str, Container]:
    """All containers of pods by their names, those that run first included."""
    documents = manifests(overlay)
    shared = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
    found = {}
    for workload in (one for one in documents if one["kind"] in WORKLOADS):
        pod, hosts = workload["spec"]["template"]["spec"], _hosts(workload, documents)
        for written in (*pod.get("initContainers", ()), *pod["containers"]):
            environment = {}
            for source in written.get("envFrom", ()):
                environment |= shared[source["configMapRef"]["name"]]
            environment |= {variable["name"]: _value(variable) for variable in written.get("env", ())}
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


def _hosts(workload: dict[str, Any], documents: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """The names of the services that lead to its pods; and, where each pod has a name of its own, the first one's."""
    labels = workload["spec"]["template"]["metadata"]["labels"]
    leading = [one for one in documents if one["kind"] == "Service"]
    names = [one["metadata"]["name"] for one in leading if one["spec"]["selector"].items() <= labels.items()]
    first = f"{workload['metadata']['name']}-0"
    return (*names, *(f"{first}.{name}" for name in names if workload["kind"] == "StatefulSet"))


def _probes(written: dict[str, Any]) -> Iterator[tuple[str, Probe]]:
    ports = {port["name"]: port["containerPort"] for port in written.get("ports", ())}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        match written.get(kind):
            case {"httpGet": {"path": path, "port": port}}:
                yield kind, Probe(url=f"http://127.0.0.1:{ports[port]}{path}")
            case {"exec": {"command": command}}:
                yield kind, Probe(tuple(command))


def _value(variable: dict[str, Any]) -> str:
    match variable:
        case {"value": str(value)}:
            return value
        case {"valueFrom": {"secretKeyRef": {"name": "mta", "key": key}}}:
            kept = {"secret": SECRETS["MTA_SECRET"], "engine-key": SECRETS["MTA_ENGINE_KEY"], "redis-url": REDIS_URL}
            return (kept | {"first-key": FIRST_KEY})[key]
        case {"valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}:
            return "1"
    raise AssertionError(f"nobody knows what {variable} is")


def with_hosts(text: str, here: Callable[[str, str], str]) -> str:
    """A text with each `host:port` of a URL replaced by what `here` makes of host and port."""
    return re.sub(r"//([\w.-]+):(\d+)", lambda found: f"//{here(found[1], found[2])}", text)
