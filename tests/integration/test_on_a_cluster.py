"""A gateway and a worker over a real cluster of Valkey servers, one of which has a replica."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.rig.cluster import ValkeyCluster
from bench.rig.processes import standing_still, wait_until
from deploy.observe.pictures.receiver import Receiver, receiving
from server.settings import Settings
from server.store.redis import keys
from server.worker.training import AdapterTrainer
from tests.integration.conftest import Work, working
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate, wait_until_ready

SAMPLES = [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(8)]
CONFIG = {"steps": 6, "learning_rate": 0.05}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries, the first of which has a replica."""
    running = ValkeyCluster(tmp_path_factory.mktemp("cluster"), replicas=1).start()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(gateway_settings: Settings, cluster: ValkeyCluster, receiver: Receiver) -> Iterator[GatewayThread]:
    """A gateway over the cluster, which is traced."""
    settings = gateway_settings.model_copy(update={"redis_url": cluster.url, "otlp_endpoint": receiver.url})
    with GatewayThread(settings) as running, running.client() as client:
        wait_until_ready(client)
        yield running


@pytest.fixture
def work(trainer: AdapterTrainer, tiny_bank_folder: Path, cluster: ValkeyCluster) -> Work:
    return working(cluster.url, trainer, tiny_bank_folder)


def somebody(gateway: GatewayThread, cluster: ValkeyCluster, primary: int) -> str:
    """A new user whom one of the primaries holds."""
    for number in _numbers:
        user = f"on-a-cluster-{number}"
        if cluster.home_of(keys.profile(gateway.key(user))) is cluster.primaries[primary]:
            return user
    raise AssertionError


def put(client: httpx.Client, user: str, text: str) -> httpx.Response:
    return client.put(f"/users/{user}/profile", json={"items": [{"id": "it", "text": text}]})


def level(client: httpx.Client, user: str) -> str:
    said: str = generate(client, user).raise_for_status().json()["personalization"]["level"]
    return said


def test_users_are_stored_served_trained_for_and_erased(
    client: httpx.Client, gateway: GatewayThread, cluster: ValkeyCluster, fake_engine: FakeEngine, work: Work
) -> None:
    fake_engine.knobs.user_adapters = True
    people = [somebody(gateway, cluster, primary) for primary in range(2)]
    jobs = {}
    for user in people:
        assert level(client, user) == "base"
        put(client, user, "surfing and the sea").raise_for_status()
        assert level(client, user) == "merged"
        asked = client.post(f"/users/{user}/adapt", json={"samples": SAMPLES, "config": CONFIG}).raise_for_status()
        jobs[user] = asked.json()["id"]
    work()
    for user in people:
        assert client.get(f"/jobs/{jobs[user]}").json()["state"] == "succeeded"
        assert level(client, user) == "stacked"
        assert client.delete(f"/users/{user}").raise_for_status().json()["erased"]["adapters"] == 1
        assert client.get(f"/users/{user}").status_code == 404
        assert level(client, user) == "base"
    assert client.get(f"/jobs/{jobs[people[0]]}").status_code == 404


def test_a_trace_says_how_long_the_store_took(
    client: httpx.Client, gateway: GatewayThread, cluster: ValkeyCluster, receiver: Receiver
) -> None:
    user = somebody(gateway, cluster, 1)
    put(client, user, "old trains").raise_for_status()
    level(client, user)
    gateway.parts.tracing._provider.force_flush()  # type: ignore[attr-defined]
    for name, stored in (("PUT /users/{user_id}/profile", "store write"), ("POST /generate", "GET")):
        request = [span for span in receiver.spans if span.name == name][-1]
        assert stored in {span.name for span in receiver.trace(request.trace_id) if span.parent == request.id}
    raw = b"".join(receiver.bodies)
    for secret in (user, gateway.key(user), "old trains", "redis.call"):
        assert secret.encode() not in raw, secret


def test_a_write_without_a_replica_is_refused_each_time(
    client: httpx.Client, gateway: GatewayThread, cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.servers.base.REPLICA_TIMEOUT_MS", 100)
    user = somebody(gateway, cluster, 0)
    with standing_still(cluster.replicas[0].pid):
        said = [put(client, user, "growing roses") for _ in range(2)]
    assert [answer.status_code for answer in said] == [503, 503]
    assert {answer.json()["error"]["code"] for answer in said} == {"store_not_durable"}
    wait_until(lambda: put(client, user, "growing roses").is_success, "the replica to have it")
