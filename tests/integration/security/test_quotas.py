"""Quotas of tenants, held by two gateways over one store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
import redis

from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import NO_OVERRIDES
from tests.integration.security.conftest import keys
from tests.support.calls import adapt
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, Keyed, generate, make_keys, metric

TENANTS = ("people", "bytes", "adapters", "tokens")
MOST = 10  # people
Gateways = list[Keyed]
pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture(scope="module")
def gateways(gateway_settings: Settings, store: ValkeyProcess, fake_engine_server: FakeEngine) -> Iterator[Gateways]:
    fake_engine_server.reset()
    secrets = make_keys(store.url, {name: (name, Scope, NO_OVERRIDES) for name in TENANTS})
    secrets |= make_keys(store.url, {"other tokens": ("tokens", Scope, NO_OVERRIDES)})
    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        for constant in ("COUNT_INTERVAL_S", "RECOUNT_CHECK_S"):
            patched.setattr(f"server.gateway.opening.{constant}", 0.1)
        yield [
            Keyed(stack.enter_context(GatewayThread(gateway_settings, redis_url=store.url)), secrets) for _ in range(2)
        ]


def put(client: httpx.Client, user: str, text: str = "a text") -> httpx.Response:
    return client.put(f"/users/{user}/profile", json={"items": [{"text": text}]})


def limit(gateways: Gateways, tenant: str, what: str, most: str) -> None:
    """Set a quota, and wait until both gateways hold it and have counted once."""
    option = "tokens-per-day" if what == "tokens" else what
    set_to = keys("quota", tenant, f"--{option}", most)
    assert set_to.exit_code == 0 and what in set_to.output, set_to.output
    for name in (f'mta_tenant_quota{{quota="{what}",tenant="{tenant}"}}', used_name(tenant, what)):
        wait_until(lambda it=name: all(it in metrics_of(each, tenant) for each in gateways), name)


def metrics_of(gateway: Keyed, key: str) -> str:
    return gateway.client(key).get("/metrics").text


def used_name(tenant: str, what: str) -> str:
    return f'mta_tenant_used{{quota="{what}",tenant="{tenant}"}}'


def until_used(gateways: Gateways, tenant: str, what: str, amount: float) -> None:
    name = used_name(tenant, what)
    wait_until(lambda: {metric(each.client(tenant), name) for each in gateways} == {amount}, f"{name} {amount}")


def refused(answer: httpx.Response, *parts: str) -> None:
    assert answer.status_code == httpx.codes.FORBIDDEN, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "quota_exceeded")
    assert all(part in error["message"] for part in parts), error["message"]


def test_people_beyond_a_quota_wait_until_others_are_erased(
    gateways: Gateways, fake_engine: FakeEngine, store: ValkeyProcess
) -> None:
    clients = [gateway.client("people") for gateway in gateways]
    limit(gateways, "people", "people", str(MOST))
    names = [f"u{number}" for number in range(4 * MOST)]
    with ThreadPoolExecutor(8) as many:
        answers = dict(zip(names, many.map(put, itertools.cycle(clients), names), strict=True))
    inside = [name for name, answer in answers.items() if answer.status_code == httpx.codes.OK]
    assert MOST <= len(inside) <= 2 * MOST, "each gateway knows at once what it let in itself"
    until_used(gateways, "people", "people", len(inside))
    for name in answers.keys() - set(inside):
        refused(answers[name], "people", f"quota of {MOST} people", "erase users", "mta keys quota people --people N")
        assert clients[0].get(f"/users/{name}").status_code == httpx.codes.NOT_FOUND
    for client in clients:
        refused(put(client, "late"))
        put(client, inside[0], "another text").raise_for_status()
        assert generate(client, inside[0]).json()["personalization"]["level"] == "merged"
        assert generate(client, "late").json()["personalization"]["level"] == "base"
    for name in inside[: len(inside) - MOST + 1]:
        clients[1].delete(f"/users/{name}").raise_for_status()
    until_used(gateways, "people", "people", MOST - 1)
    put(clients[0], "late").raise_for_status()
    until_used(gateways, "people", "people", MOST)
    assert f"{MOST} of {MOST} people" in keys("list").stdout
    with redis.Redis.from_url(store.url) as raw:
        wait_until(lambda: any(raw.scan_iter("mta:held:recounted/*")), "a recount")
    assert keys("quota", "people", "--people", "0").exit_code == 0
    wait_until(lambda: put(clients[0], "later").is_success, "the quota to go")


def test_bytes(gateways: Gateways) -> None:
    client = gateways[0].client("bytes")
    limit(gateways, "bytes", "bytes", "10k")
    put(client, "ada", "x" * 5000).raise_for_status()
    refused(put(client, "bob", "x" * 9000), "of its quota of 10,000 bytes")
    put(client, "ada", "x" * 4000).raise_for_status()
    many = [{"input": f"{number}", "output": "x" * 300} for number in range(30)]
    refused(adapt(client, "ada", samples=many), "bytes")
    until_used(gateways, "bytes", "bytes", client.get("/users/ada").json()["bytes"])
    adapt(client, "ada").raise_for_status()
    refused(adapt(client, "ada", samples=many), "bytes")  # though the open job's adapter is counted already


def test_adapters_count_from_their_job_on(gateways: Gateways) -> None:
    here, there = (gateway.client("adapters") for gateway in gateways)
    limit(gateways, "adapters", "adapters", "1")
    job = adapt(here, "ada").raise_for_status().json()
    until_used(gateways, "adapters", "adapters", 1)
    refused(adapt(there, "bob"), "of its quota of 1 adapters")
    assert there.get("/users/bob").status_code == httpx.codes.NOT_FOUND
    assert adapt(there, "ada").raise_for_status().json()["id"] == job["id"]
    here.delete(f"/jobs/{job['id']}").raise_for_status()
    until_used(gateways, "adapters", "adapters", 0)
    adapt(there, "bob").raise_for_status()


def test_tokens_a_day_are_those_of_all_keys(gateways: Gateways, fake_engine: FakeEngine) -> None:
    limit(gateways, "tokens", "tokens", "1k")
    clients = [gateway.client(key) for gateway, key in zip(gateways, ("tokens", "other tokens"), strict=True)]
    for client in clients:
        generate(client, "ada", max_tokens=400).raise_for_status()
    used = used_name("tokens", "tokens")
    wait_until(lambda: {metric(each.client("tokens"), used) > 700 for each in gateways} == {True}, "tokens to count")
    seen = len(fake_engine.seen)
    for client in clients:
        for stream in (False, True):
            refused(generate(client, "ada", max_tokens=400, stream=stream), "tokens a day", "--tokens-per-day N")
    assert len(fake_engine.seen) == seen, "nothing was generated"
    generate(clients[0], "ada", max_tokens=50).raise_for_status()


def test_a_quota_that_cannot_be_set(gateways: Gateways) -> None:
    for amount in ("2 G", "-1", "", "1e3"):
        assert "is not an amount" in keys("quota", "free", "--people", amount).output
    assert "only to adapters, bytes" in str(keys("quota", "nobody", "--people", "1").exception)
