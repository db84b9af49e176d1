"""Where secrets must not be: answers, logs, metrics, process lists, the store, what is printed."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import httpx
import pytest
import redis
from typer.testing import CliRunner

from bench.rig.processes import command_line, mta, running
from bench.rig.valkey import ValkeyProcess, free_port
from server.cli import app
from server.store.tenants.access_keys import new_secret
from tests.support.fake_engine import KEY
from tests.support.gateway import SECRET, Keyed

ID = re.compile(r"key ([0-9a-f]{12}) ")


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


def test_metrics_hold_neither_keys_nor_users_nor_tenants_that_nobody_named(
    keyed: Keyed, acme: httpx.Client, stranger: httpx.Client, shared_name: str
) -> None:
    acme.get(f"/users/{shared_name}").raise_for_status()
    told = stranger.get("/metrics", headers=keyed.header("only admin")).raise_for_status().text
    for secret in (*keyed.secrets.values(), SECRET, KEY, shared_name, "acme", "globex"):
        assert secret not in told


def test_a_store_that_fails_names_no_password(keyed: Keyed, stranger: httpx.Client) -> None:
    url = f"redis://:a-password@127.0.0.1:{free_port()}/0"
    found = CliRunner().invoke(app, ["keys", "list"], env={"MTA_REDIS_URL": url})
    assert found.exit_code != 0
    assert "a-password" not in found.output + str(found.exception)
    detail = stranger.get("/ready", headers=keyed.header("only admin")).text
    assert keyed.gateway.parts.settings.redis_url not in detail


def test_the_store_and_its_files_hold_no_key(keyed: Keyed, store: ValkeyProcess) -> None:
    with redis.Redis.from_url(store.url) as raw:
        kept = repr(raw.hgetall("mta:{access}:keys"))
    for secret in keyed.secrets.values():
        assert secret[4:-4] not in kept
        for path in Path(store.folder).rglob("*"):
            assert not path.is_file() or secret[4:-4].encode() not in path.read_bytes()


def test_a_key_is_shown_once_and_never_listed(store: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_REDIS_URL", store.url)
    made = CliRunner().invoke(app, ["keys", "create", "an app", "--tenant", "acme", "--scope", "generate"])
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert secret.startswith("mta_")
    listed = CliRunner().invoke(app, ["keys", "list"], env={"COLUMNS": "200"}).output
    found = ID.search(made.stderr)
    assert found
    for told in (found[1], "an app", "acme", "generate", secret[-4:]):
        assert told in listed
    assert secret[4:-4] not in listed


def test_no_process_that_sends_a_key_shows_it(keyed: Keyed) -> None:
    secret = keyed.secrets["acme"]
    waits = ("users", "import", "/dev/stdin", "--url", keyed.gateway.url)
    environment: dict[str, str | None] = {"MTA_API_KEY": secret}
    with running(mta(*waits), environment) as process:
        assert secret not in command_line(process.process.pid)
    assert secret not in command_line(os.getpid())
