"""The compose files as compose reads them, without a container daemon; `test_containers.py` starts what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.containers import BASE, CPU, FLEET, ROOT, SECRETS, composed, config, containers, services

COMBINATIONS = {"gpu": (BASE,), "cpu": (BASE, CPU)}
IN_A_FLEET = ("--env-file", FLEET)

PAGE = (ROOT / "docs/deploying.md").read_text("utf-8")
DOCUMENTED = re.findall(r"^\$ docker compose (.*?) ?up -d", PAGE, re.MULTILINE)


@pytest.mark.parametrize("files", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_a_fleet_is_two_of_each_behind_a_router_and_gateways_alone_are_published_on_loopback(
    files: tuple[str, ...], tmp_path: Path
) -> None:
    alone, fleet = services(files, tmp_path), services(files, tmp_path, *IN_A_FLEET)
    for found, gateways in ((alone, ["gateway"]), (fleet, ["gateway", "gateway-2"])):
        published = {name: service["ports"] for name, service in found.items() if service.get("ports")}
        assert sorted(published) == gateways
        assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}
        assert len({port["published"] for ports in published.values() for port in ports}) == len(gateways)
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


def test_whom_prometheus_asks_has_metrics_there(tmp_path: Path) -> None:
    jobs = yaml.safe_load((ROOT / "deploy/observe/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert {job["job_name"] for job in jobs} == {"engine", "gateway", "router", "worker"}
    fleet, pods = composed((BASE,), tmp_path, *IN_A_FLEET), containers("gpu")
    for job in jobs:
        [looked] = job["dns_sd_configs"]
        found = [one for one in fleet.values() if set(looked["names"]) & set(one.hosts)]
        assert len(found) == (1 if job["job_name"] == "router" else 2)
        assert all(str(looked["port"]) in one.environment.values() for one in found), job["job_name"]
        assert looked["port"] in [port["containerPort"] for port in pods[job["job_name"]].written["ports"]]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_what_the_page_says_is_read_by_compose(command: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MTA_SECRET=s\nMTA_ENGINE_KEY=k\nMTA_BANK_DIR={tmp_path}\n")
    options = command.replace("--env-file .env", f"--env-file {tmp_path}/.env").split()
    given = {} if "--env-file" in options else SECRETS | {"MTA_BANK_DIR": str(tmp_path)}
    done = config((), given, *options)
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)["services"].keys()
    assert ("gateway-2" in started) is (FLEET in options)
    assert ("prometheus" in started) is ("observe" in options)


def test_the_page_replaces_every_part_of_a_fleet_one_by_one(tmp_path: Path) -> None:
    (before, parts) = re.findall(r"fleet.env build\n(.+)\n\$ for part in (.+); do", PAGE)[0]
    assert " run --rm models " in before, "nobody else may write what engines of the new image read"
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
