"""A gateway and a worker over a real cluster of Valkey servers, one of which has a replica."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import pytest
from redis.crc import key_slot
from typer.testing import CliRunner

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.processes import standing_still, wait_until
from deploy.observe.pictures.receiver import Receiver, receiving
from server.cli import app
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


def test_people_write_ask_are_trained_for_and_go_with_a_replica_and_without(
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


def test_a_file_of_people_is_imported(gateway: GatewayThread, client: httpx.Client, tmp_path: Path) -> None:
    path = tmp_path / "people.ndjson"
    path.write_text("".join(json.dumps({"user_id": f"import-{n}", "profile": [f"I am {n}"]}) + "\n" for n in range(12)))
    done = CliRunner().invoke(app, ["users", "import", str(path), "--url", gateway.url])
    assert done.output.splitlines()[-1] == "12 imported, 0 were already, 0 failed"
    assert {client.get(f"/users/import-{n}").json()["items"] for n in range(12)} == {1}


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


def test_a_write_that_has_not_reached_the_replica_is_refused_however_often_it_is_sent(
    client: httpx.Client, gateway: GatewayThread, cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.servers.base.REPLICA_TIMEOUT_MS", 100)
    user = somebody(gateway, cluster, 0)
    with standing_still(cluster.replicas[0].pid):
        said = [put(client, user, "growing roses") for _ in range(2)]
    assert [answer.status_code for answer in said] == [503, 503]
    assert {answer.json()["error"]["code"] for answer in said} == {"store_not_durable"}
    wait_until(lambda: put(client, user, "growing roses").is_success, "the replica to have it")


class People:
    """Some who write and ask, all the while."""

    def __init__(self, gateway: GatewayThread, users: list[str]) -> None:
        self.written = dict.fromkeys(users, 0)
        self.statuses = set[int]()
        self._gateway, self._enough = gateway, Event()
        self._pool = ThreadPoolExecutor(len(users))
        self._running: list[Future[None]] = []

    def __enter__(self) -> People:
        self._running = [self._pool.submit(self._go_on, user) for user in self.written]
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._pool.shutdown()
        for running in self._running:
            running.result()

    def more(self) -> None:
        """Wait until everybody has written and been answered a few times more."""
        before = dict(self.written)
        wait_until(lambda: all(self.written[user] > before[user] + 3 for user in before), "everybody to go on")

    def _go_on(self, user: str) -> None:
        with self._gateway.client() as client:
            for number in itertools.count(1):
                if self._enough.is_set():
                    return
                wrote = put(client, user, f"text {number}")
                asked = generate(client, user)
                self.statuses |= {wrote.status_code, asked.status_code}
                if wrote.is_success:
                    self.written[user] = number


def found(client: httpx.Client, user: str) -> int:
    """The number of the text that a user has."""
    return int(client.get(f"/users/{user}/export").raise_for_status().json()["items"][0]["text"].split()[1])


def test_nobody_notices_that_a_slot_moves(
    client: httpx.Client, gateway: GatewayThread, cluster: ValkeyCluster, fake_engine: FakeEngine
) -> None:
    users = [somebody(gateway, cluster, primary) for primary in (1, 1, 2)]
    with People(gateway, users) as people:
        people.more()
        for user in users[:2]:
            cluster.move(key_slot(keys.profile(gateway.key(user)).encode()), *cluster.primaries[1:])
        people.more()
    assert people.statuses == {200}
    assert {user: found(client, user) for user in users} == people.written


def test_people_go_on_once_a_replica_has_taken_over(
    client: httpx.Client, gateway: GatewayThread, cluster: ValkeyCluster, fake_engine: FakeEngine
) -> None:
    users = [somebody(gateway, cluster, primary) for primary in (0, 0, 2)]
    with People(gateway, users) as people:
        people.more()
        cluster.primaries[0].kill()
        people.more()
    assert people.statuses <= {200, 503}
    assert all(found(client, user) >= people.written[user] for user in users)
    wait_until_ready(client)
    assert ask(cluster.replicas[0], "ROLE")[0] == b"master"
