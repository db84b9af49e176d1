"""A tenant that names a bank is served by it; everybody else by the gateway's own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from typer.testing import CliRunner

from bank.manifest import BankManifest, read_manifest
from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.cli import app
from server.settings import Settings
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import NO_OVERRIDES
from tests.integration.security.conftest import ask, keys
from tests.support.calls import put
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, GatewayThread, Keyed, give_adapter, make_keys, wait_until_ready


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    from bench.rig.tiny import tiny_bank  # imports torch

    return tiny_bank(tmp_path_factory.mktemp("second") / "bank", tiny_model_folder, embedder_folder, anchors=4, seed=2)


@pytest.fixture(scope="module")
def two_banks(gateway_settings: Settings, store: ValkeyProcess, second: Path, fake_engine_server: FakeEngine) -> Any:
    secrets = make_keys(store.url, {tenant: (tenant, Scope, NO_OVERRIDES) for tenant in ("acme", "globex")})
    before = fake_engine_server.knobs.banks
    fake_engine_server.knobs.banks = (*before, read_manifest(second).fingerprint)
    with GatewayThread(gateway_settings, redis_url=store.url, next_bank=second) as gateway:
        yield Keyed(gateway, secrets)
    fake_engine_server.knobs.banks = before


@pytest.fixture
def named(two_banks: Keyed, environment: None, second: Path) -> BankManifest:
    """The second bank, which acme names by now."""
    manifest = read_manifest(second)
    assert keys("bank", "acme", manifest.short).exit_code == 0
    wait_until(lambda: bank_of(two_banks, "acme") == manifest.short, "the tenant's bank to be known")
    return manifest


def bank_of(two_banks: Keyed, tenant: str) -> str:
    with two_banks.client(tenant) as client:
        answer = client.get("/bank").json()
        return str(answer.get("bank") or answer["error"]["code"])


def test_missing_bank_is_not_ready_and_named_to_admins_only(
    two_banks: Keyed, second: Path, fake_engine_server: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    lacking, both = read_manifest(second), fake_engine_server.knobs.banks
    with two_banks.client("acme") as admin, httpx.Client(base_url=two_banks.gateway.url) as stranger:
        wait_until_ready(stranger)
        fake_engine_server.knobs.banks = both[:1]
        try:
            wait_until(lambda: stranger.get("/ready").status_code == httpx.codes.SERVICE_UNAVAILABLE, "it to find out")
            said = stranger.get("/ready").text
            [engine] = admin.get("/ready").json()["parts"]["engines"]
        finally:
            fake_engine_server.knobs.banks = both
        wait_until_ready(stranger)
    assert '"not_ready"' in said
    assert lacking.short not in said
    assert engine["status"] == "lacks_bank"
    assert lacking.short in engine["detail"]
    [line] = [line for line in caplog.messages if "none of them has the bank" in line and lacking.short in line]
    assert read_manifest(two_banks.gateway.opened.settings.bank_folder()).short not in line


def test_tenants_own_bank(two_banks: Keyed, named: BankManifest, store: ValkeyProcess, fake_engine: FakeEngine) -> None:
    usual = two_banks.gateway.parts.bank.manifest.short
    for tenant, bank in (("acme", named.short), ("globex", usual)):
        with two_banks.client(tenant) as client:
            recipe = put(client, "ada")["recipe"]
            assert recipe.split(":")[1] == bank
            assert ask(client, "POST /generate", {}, "ada").json()["personalization"]["level"] == "merged"
            assert client.get("/users/ada").json()["recipe"].split(":")[1] == bank == bank_of(two_banks, tenant)
            ask(client, "POST /users/{user_id}/adapt", {}, "ada").raise_for_status()
    assert [seen.body["model"].split(":")[1] for seen in fake_engine.seen] == [named.short, usual]
    with redis.Redis.from_url(store.url) as raw:
        assert [raw.zcard(f"mta:{{jobs:{bank}}}:due") for bank in (named.short, usual)] == [1, 1]


def test_readapting(two_banks: Keyed, named: BankManifest, second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = two_banks.gateway.opened.settings.bank_folder()
    monkeypatch.setenv("MTA_SECRET", SECRET)
    for user, bank in (("rosa", named.short), ("kai", read_manifest(first).short)):
        for tenant in ("acme", "globex"):
            with two_banks.client(tenant) as client:
                put(client, user)
                ask(client, "POST /users/{user_id}/adapt", {}, user).raise_for_status()
            asyncio.run(give_adapter(two_banks.gateway, user, tenant, bank))
    for usual, options, counted in (
        (first, (), "1 users have a job, 1 need none"),  # of the two rosas, globex's
        (first, ("--bank", str(second)), "1 users have a job, 1 need none"),  # of the two kais, acme's
        (second, (), "2 users have a job, 0 need none"),  # both kais, if all gateways have moved
    ):
        monkeypatch.setenv("MTA_BANK", str(usual))
        ran = CliRunner().invoke(app, ["readapt", "--at-a-time", "100", *options])
        assert counted in ran.output


def test_a_bank_that_is_not_loaded_is_said_and_taken_back(two_banks: Keyed, named: BankManifest) -> None:
    assert keys("bank", "acme", "00000000").exit_code == 0
    wait_until(lambda: bank_of(two_banks, "acme") == "no_bank", "the tenant's bank to be known")
    assert bank_of(two_banks, "globex") == two_banks.gateway.parts.bank.manifest.short
    assert httpx.get(f"{two_banks.gateway.url}/ready").status_code == httpx.codes.OK
    assert two_banks.client("acme").delete("/users/nobody").status_code == httpx.codes.NOT_FOUND, "erasures always work"
    assert two_banks.client("acme").get(f"/jobs/{'a' * 26}.1").status_code == httpx.codes.NOT_FOUND
    assert keys("bank", "acme").exit_code == 0
    usual = two_banks.gateway.parts.bank.manifest.short
    wait_until(lambda: bank_of(two_banks, "acme") == usual, "the gateway's own bank")


@pytest.mark.parametrize(("tenant", "bank"), [("nobody", "0" * 8), ("acme", "0" * 7), ("acme", "A" * 8)])
def test_what_is_no_tenant_or_no_bank_is_refused(two_banks: Keyed, named: BankManifest, tenant: str, bank: str) -> None:
    assert keys("bank", tenant, bank).exit_code == 1
    assert bank_of(two_banks, "acme") == named.short
