"""Where secrets must not be, who reaches whom in compose, and that `docs/security.md` names tests that exist."""

from __future__ import annotations

import ast
import logging
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml

from bench.rig.processes import command_line, mta, running
from bench.rig.valkey import ValkeyProcess, free_port
from server.store.tenants.access_keys import new_secret
from tests.integration.security.conftest import create, keys
from tests.support.fake_engine import KEY
from tests.support.gateway import SECRET, Keyed

ROOT = Path(__file__).parents[3]
FILE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
SHOWN_TO_OPERATORS = {"alertmanager", "grafana"}  # on this machine's own address


def test_services_but_the_gateway_stay_on_the_inner_network() -> None:
    assert FILE["networks"]["inner"] == {"internal": True}
    between = {name for name, service in SERVICES.items() if {"inner", "outer"} <= set(service["networks"])}
    assert between
    assert all("gateway" in name or name in SHOWN_TO_OPERATORS for name in between), between
    outside = {name for name, service in SERVICES.items() if "inner" not in service["networks"]}
    assert outside == {"models"}  # runs once and reaches a hub; it shares no network with the others


def test_whoever_holds_the_secret_of_users_is_a_gateway() -> None:
    holders = {name for name, service in SERVICES.items() if "MTA_SECRET" in service.get("environment", {})}
    assert holders == {name for name in SERVICES if "gateway" in name}


def test_every_case_has_a_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    cases = re.findall(r"^\| .+ \| .+ \| `(tests/[^`]+)` \|$", page, re.M)
    assert len(set(cases)) == len(cases) >= 40
    for case in cases:
        file, *names = case.split("::")
        inside: Any = ast.parse((ROOT / file).read_text("utf-8")).body
        for name in names:
            found = next((node for node in inside if getattr(node, "name", "") == name), None)
            assert found, f"{case} does not exist"
            inside = getattr(found, "body", [])
        assert names, case


def test_a_refusal_repeats_no_key(keyed: Keyed, stranger: httpx.Client) -> None:
    for secret in (new_secret(), keyed.secrets["revoked"], keyed.secrets["only admin"]):
        refused = stranger.get("/users/ada", headers={"Authorization": f"Bearer {secret}"})
        assert secret[4:] not in refused.text
        assert secret[4:] not in str(refused.headers)


def test_no_log_line_holds_a_key_a_user_or_a_secret(
    keyed: Keyed, acme: httpx.Client, stranger: httpx.Client, shared_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "mta"):
        acme.get(f"/users/{shared_name}").raise_for_status()
        stranger.get(f"/users/{shared_name}", headers=keyed.header("revoked"))
        stranger.get("/v1/models", headers={"Authorization": f"Bearer {new_secret()}"})
        stranger.get(f"/no-such-route-{shared_name}")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("mta")]
    assert lines
    for secret in (*keyed.secrets.values(), SECRET, KEY, shared_name, "mta_"):
        assert not any(secret in line for line in lines)


def test_metrics_identify_nobody(keyed: Keyed, acme: httpx.Client, stranger: httpx.Client, shared_name: str) -> None:
    acme.get(f"/users/{shared_name}").raise_for_status()
    told = stranger.get("/metrics", headers=keyed.header("only admin")).raise_for_status().text
    for secret in (*keyed.secrets.values(), SECRET, KEY, shared_name, "acme", "globex"):
        assert secret not in told


def test_store_errors_name_no_password(keyed: Keyed, stranger: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_REDIS_URL", f"redis://:a-password@127.0.0.1:{free_port()}/0")
    found = keys("list")
    assert found.exit_code != 0
    assert "a-password" not in found.output + str(found.exception)
    detail = stranger.get("/ready", headers=keyed.header("only admin")).text
    assert keyed.gateway.opened.settings.redis_url not in detail


def test_the_store_and_its_files_hold_no_key(keyed: Keyed, store: ValkeyProcess) -> None:
    with redis.Redis.from_url(store.url) as raw:
        kept = repr(raw.hgetall("mta:{access}:keys"))
    for secret in keyed.secrets.values():
        assert secret[4:-4] not in kept
        for path in Path(store.folder).rglob("*"):
            assert not path.is_file() or secret[4:-4].encode() not in path.read_bytes()


@pytest.mark.usefixtures("environment")
def test_a_key_is_shown_once_and_never_listed() -> None:
    secret, key_id = create("an app", "--tenant", "acme", "--scope", "generate")
    assert secret.startswith("mta_")
    listed = keys("list").output
    for told in (key_id, "an app", "acme", "generate", secret[-4:]):
        assert told in listed
    assert secret[4:-4] not in listed


def test_no_process_that_sends_a_key_shows_it(keyed: Keyed) -> None:
    secret = keyed.secrets["acme"]
    waits = ("users", "import", "/dev/stdin", "--url", keyed.gateway.url)
    environment: dict[str, str | None] = {"MTA_API_KEY": secret}
    with running(mta(*waits), environment) as process:
        assert secret not in command_line(process.process.pid)
    assert secret not in command_line(os.getpid())
