"""A gateway and a worker over a real cluster, one of whose servers is gone in the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.rig.processes import wait_until
from server.settings import Settings
from server.store.redis import keys
from server.worker.training import AdapterTrainer
from tests.integration.conftest import Work, working
from tests.support.calls import adapt, job_of
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate, wait_until_ready
from tests.support.observe.receiver import Receiver
from tests.support.valkeys.cluster import ValkeyCluster

CONFIG = {"steps": 6, "learning_rate": 0.05}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def gateway(gateway_settings: Settings, followed: ValkeyCluster, receiver: Receiver) -> Iterator[GatewayThread]:
    with GatewayThread(gateway_settings, redis_url=followed.url, otlp_endpoint=receiver.url) as running:
        with running.client() as client:
            wait_until_ready(client)
        yield running


@pytest.fixture
def work(trainer: AdapterTrainer, tiny_bank_folder: Path, followed: ValkeyCluster) -> Work:
    return working(followed.url, trainer, tiny_bank_folder)


def somebody(gateway: GatewayThread, followed: ValkeyCluster, primary: int) -> str:
    """A new user whom one of the primaries holds."""
    users = (f"on-a-cluster-{number}" for number in _numbers)
    home = followed.primaries[primary]
    return next(user for user in users if followed.home_of(keys.profile(gateway.key(user))) is home)


def put(client: httpx.Client, user: str, text: str = "surfing and the sea") -> httpx.Response:
    return client.put(f"/users/{user}/profile", json={"items": [{"id": "it", "text": text}]})


def level(client: httpx.Client, user: str) -> str:
    said: str = generate(client, user).raise_for_status().json()["personalization"]["level"]
    return said


def test_a_user_is_stored_served_trained_for_and_erased(
    client: httpx.Client, gateway: GatewayThread, followed: ValkeyCluster, fake_engine: FakeEngine, work: Work
) -> None:
    fake_engine.knobs.user_adapters = True
    due, *_ = keys.queue("jobs", gateway.parts.bank.manifest.short)
    user = somebody(
        gateway, followed, 0 if followed.home_of(due) is followed.primaries[1] else 1
    )  # not where the queue is
    assert level(client, user) == "base"
    put(client, user).raise_for_status()
    assert level(client, user) == "merged"
    job = adapt(client, user, config=CONFIG).raise_for_status().json()
    work()
    assert job_of(client, job)["state"] == "succeeded"
    assert level(client, user) == "stacked"
    assert client.delete(f"/users/{user}").raise_for_status().json()["erased"]["adapters"] == 1
    assert [client.get(path).status_code for path in (f"/users/{user}", f"/jobs/{job['id']}")] == [404, 404]
    assert level(client, user) == "base"


def test_a_trace_says_how_long_the_store_took(
    client: httpx.Client, gateway: GatewayThread, followed: ValkeyCluster, receiver: Receiver
) -> None:
    user = somebody(gateway, followed, 1)
    put(client, user, "old trains").raise_for_status()
    level(client, user)
    gateway.opened.tracing._provider.force_flush()  # type: ignore[attr-defined]
    for name, stored in (("PUT /users/{user_id}/profile", "store write"), ("POST /generate", "EVALSHA")):
        request = [span for span in receiver.spans if span.name == name][-1]
        assert stored in {span.name for span in receiver.trace(request.trace_id) if span.parent == request.id}
    raw = b"".join(receiver.bodies)
    for secret in (user, gateway.key(user), "old trains", "redis.call"):
        assert secret.encode() not in raw, secret


def test_a_gateway_serves_others_while_a_primary_is_gone(
    client: httpx.Client,
    gateway: GatewayThread,
    followed: ValkeyCluster,
    fake_engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.store.redis.servers.cluster.DISCOVERY_TIMEOUT_S", 10.0)  # who answers late is there
    monkeypatch.setattr("server.store.redis.servers.connection.CHECK_TIMEOUT_S", 60.0)
    gone = followed.primaries[1]
    known, *others, lost = (somebody(gateway, followed, primary) for primary in (1, 0, 2, 1))
    put(client, known).raise_for_status()
    gone.kill()
    wait_until(lambda: client.get("/ready").json()["detail"] is not None, "the gateway to see it")
    for user in (known, lost):
        for refused in (put(client, user), generate(client, user)):
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    for user in others:
        assert (put(client, user).status_code, level(client, user)) == (200, "merged")
    said = client.get("/ready").raise_for_status().json()
    assert said["parts"]["redis"]["status"] == "partial"
    assert "33% of all users cannot be served" in said["detail"]
    assert f"127.0.0.1:{gone.port}" in said["detail"]
    gone.start()
    wait_until(lambda: put(client, lost).is_success, "it to be back")
