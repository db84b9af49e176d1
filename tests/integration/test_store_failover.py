"""What gateways say, and whom they serve, while their store's servers change places or are gone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.processes import wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess, free_port
from server.settings import Settings
from server.store.redis import keys
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate, wait_until_ready

pytestmark = pytest.mark.usefixtures("fake_engine")


def put(client: httpx.Client, user: str) -> httpx.Response:
    return client.put(f"/users/{user}/profile", json={"items": [{"id": "it", "text": "surfing and the sea"}]})


def ready(client: httpx.Client) -> tuple[int, Any]:
    answer = client.get("/ready")
    return answer.status_code, answer.json()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyProcess]:
    running = ValkeyProcess(tmp_path).start()
    yield running
    running.kill()


def test_a_gateway_is_not_ready_while_its_store_is_a_replica(gateway_settings: Settings, server: ValkeyProcess) -> None:
    settings = gateway_settings.model_copy(update={"redis_url": server.url})
    with GatewayThread(settings) as gateway, gateway.client() as client:
        wait_until_ready(client)
        put(client, "ada").raise_for_status()
        ask(server, "REPLICAOF", "127.0.0.1", free_port())
        wait_until(lambda: ready(client)[0] == 503, "the gateway to see it")
        assert "it is a replica of 127.0.0.1" in ready(client)[1]["parts"]["redis"]["detail"]
        refused = put(client, "bob")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert generate(client, "ada").json()["personalization"]["level"] == "merged"  # it can be read
        ask(server, "REPLICAOF", "NO", "ONE")
        wait_until_ready(client)
        put(client, "bob").raise_for_status()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries that go on when one is gone."""
    options = (*DURABLE, "--cluster-require-full-coverage", "no")
    running = ValkeyCluster(tmp_path_factory.mktemp("cluster"), options).start()
    yield running
    running.kill()


def test_a_gateway_serves_others_while_a_primary_is_gone(
    gateway_settings: Settings, cluster: ValkeyCluster, fake_engine: FakeEngine
) -> None:
    gone = cluster.primaries[1]
    settings = gateway_settings.model_copy(update={"redis_url": cluster.url})
    with GatewayThread(settings) as gateway, gateway.client() as client:
        wait_until_ready(client)
        homes = {user: cluster.home_of(keys.profile(gateway.key(user))) for user in (f"user-{n}" for n in range(12))}
        gone.kill()
        wait_until(lambda: ready(client)[1]["detail"] is not None, "the gateway to see it")
        for user, home in homes.items():
            statuses = {put(client, user).status_code, generate(client, user).status_code}
            assert statuses == ({503} if home is gone else {200})
            if home is gone:
                assert put(client, user).json()["error"]["code"] == "store_unavailable"
        status, said = ready(client)
        assert (status, said["parts"]["redis"]["status"]) == (200, "partial")
        assert "33% of all users cannot be served" in said["detail"]
        assert f"127.0.0.1:{gone.port}" in said["detail"]
        assert set(itertools.chain(homes.values())) == set(cluster.primaries)
        gone.start()
        wait_until(lambda: ready(client)[1]["parts"]["redis"]["status"] == "ok", "it to be back")
        for user in homes:
            put(client, user).raise_for_status()
