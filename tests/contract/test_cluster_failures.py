"""A cluster whose servers are silent or gone: what a replica has when it takes over, and who is served without one."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.processes import paused, wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.errors import Unavailable
from server.store import profiles as profile_scripts
from server.store.durability import Durability
from server.store.jobs import JobState, JobStore, Trained
from server.store.profiles import ProfileStore
from server.store.redis import keys, scripts
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import claimed, submitted
from tests.support.stored import LATER_MS, Writing, change, connected, opened, users_at

READS = 200
"""More than there are places for, on one connection of the stores."""

REPLICA_TIMEOUT_MS = "server.store.redis.servers.base.REPLICA_TIMEOUT_MS"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries, the first of which has a replica."""
    running = ValkeyCluster(tmp_path_factory.mktemp("followed"), replicas=1).start()
    yield running
    running.kill()


async def test_a_write_without_a_replica_is_not_acknowledged(
    followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REPLICA_TIMEOUT_MS, 100)
    users = users_at(followed, followed.primaries[0])
    async with opened(followed.url) as store:
        assert await store.commit(next(users), b"", change("a"))
        with paused(followed.replicas[0].pid):
            with pytest.raises(Unavailable, match="on a replica"):
                await store.commit(next(users), b"", change("a"))
            elsewhere = next(users_at(followed, followed.primaries[1]))
            assert await store.commit(elsewhere, b"", change("a"))
            monkeypatch.setattr("server.store.redis.servers.cluster.REFRESH_S", 3600.0)
            wait_until(lambda: not followed.lists_replicas(followed.primaries[1]), "the replica to count as failed")
            with pytest.raises(Unavailable, match="on a replica"):
                await store.commit(next(users), b"", change("a"))
            assert await store.commit(next(users), b"", change("a"))  # nobody waits for it any more


class Repeatable(RedisConnection):
    """Remembers what was written, by script."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.written = dict[str, tuple[Any, ...]]()

    async def write(self, script: str, names: Sequence[str], *arguments: Any) -> Any:
        self.written[script] = (names, *arguments)
        return await super().write(script, names, *arguments)


async def test_nor_is_one_that_is_sent_again(followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server waits for what a connection wrote: for nothing, if all is already as it should be."""
    users = users_at(followed, followed.primaries[0])
    user, erased = next(users), next(users)
    connection = Repeatable(followed.url)
    await connection.check()
    profiles, jobs = ProfileStore(connection), JobStore(connection)
    await profiles.commit(user, b"", change("a"))
    await profiles.wait_until_durable(user)
    await profiles.erase(erased, LATER_MS, 0)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    await jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))
    await jobs.cancel((await submitted(jobs, user)).id)
    await submitted(jobs, user)
    said = {
        "commit": profile_scripts._COMMIT,
        "settle": profile_scripts._WRITE_AGAIN,
        "erase": profile_scripts._ERASE,
        "submit": scripts.SUBMIT,
        "cancel": scripts.CANCEL,
        "end": scripts.END,
    }
    acknowledged = []
    for name, script in said.items():
        wait_until(lambda: all(map(followed.lists_replicas, followed.nodes)), "the replica to be back")
        await connection.check()
        with paused(followed.replicas[0].pid), monkeypatch.context() as briefly:
            briefly.setattr(REPLICA_TIMEOUT_MS, 100)
            try:
                await connection.write(script, *connection.written[script])
            except Unavailable as error:
                assert "on a replica" in str(error)
            else:
                acknowledged.append(name)
    assert acknowledged == []
    await connection.close()


async def test_replicas_that_a_redirection_made_the_client_forget_are_found_again(followed: ValkeyCluster) -> None:
    async with connected(followed.url) as connection:
        slots = connection._servers._client.nodes_manager.slots_cache  # type: ignore[attr-defined]
        slots[1] = slots[1][:1]  # what redis-py makes of a slot when a read is sent elsewhere
        await connection.check()
        slots = connection._servers._client.nodes_manager.slots_cache  # type: ignore[attr-defined]
        assert [len(slots[slot]) for slot in (0, 1, 2)] == [2, 2, 2]


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_what_was_acknowledged_is_there_after_a_replica_took_over(
    followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch, *, silent: bool
) -> None:
    """What was sent meanwhile was written after a while, or refused."""
    monkeypatch.setattr("server.store.redis.servers.connection.WRITE_TIMEOUT_S", 3.0)
    monkeypatch.setattr("server.store.redis.servers.cluster.REFRESH_S", 1.0)
    pair = (followed.primaries[0], followed.replicas[0])
    (lost,) = [node for node in pair if ask(node, "ROLE")[0] == b"master"]
    users = list(itertools.islice(users_at(followed, followed.primaries[0]), 4))
    async with connected(followed.url) as connection, asyncio.timeout(120):
        writing = Writing(ProfileStore(connection), users)
        async with writing:
            await writing.goes_on()
            os.kill(lost.pid, signal.SIGSTOP) if silent else lost.kill()
            await writing.goes_on()
        await writing.check()
        if silent:
            os.kill(lost.pid, signal.SIGCONT)
            return
        lost.start()
        while not all(map(followed.lists_replicas, followed.nodes)):
            await asyncio.sleep(0.1)
        assert len(await connection.holders(keys.profile(users[0]))) == 2
        assert await connection.check() is Durability.ALWAYS


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries that go on when one is gone."""
    options = (*DURABLE, "--cluster-require-full-coverage", "no")
    running = ValkeyCluster(tmp_path_factory.mktemp("lenient"), options).start()
    yield running
    running.kill()


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_who_lives_elsewhere_is_served(lenient: ValkeyCluster, *, silent: bool) -> None:
    gone, there = lenient.primaries[1], lenient.primaries[2]
    lost, served = next(users_at(lenient, gone)), next(users_at(lenient, there))
    async with connected(lenient.url) as connection:
        store = ProfileStore(connection)
        assert connection.unserved is None
        with paused(*([gone.pid] if silent else [])):
            if not silent:
                gone.kill()
            assert await connection.check() is Durability.ALWAYS
            assert "33% of all users cannot be served" in str(connection.unserved)
            assert f"127.0.0.1:{gone.port}" in str(connection.unserved)
            reading = [asyncio.create_task(store.load(lost)) for _ in range(READS)]
            writing = [asyncio.create_task(store.commit(lost, b"", change("a"))) for _ in range(READS)]
            await asyncio.sleep(0)
            assert await store.commit(served, b"", change("a"))
            assert await store.load(served) is not None
            refused = await asyncio.gather(*reading, *writing, return_exceptions=True)
            assert {error.code for error in refused if isinstance(error, Unavailable)} == {"store_unavailable"}
            assert all(isinstance(error, Unavailable) for error in refused)
        if not silent:
            gone.start()
        wait_until(lambda: {state(node) for node in lenient.nodes} == {"ok"}, "peace")
        await connection.check()
        assert connection.unserved is None
        assert await store.commit(lost, b"", change("a"))


async def test_a_cluster_that_serves_less_than_half_is_not_usable(lenient: ValkeyCluster) -> None:
    async with connected(lenient.url) as connection:
        for gone in lenient.primaries[:2]:
            gone.kill()
        with pytest.raises(Unavailable, match="cannot be used"):
            await connection.check()


async def test_a_cluster_that_serves_nobody_once_a_primary_is_gone_is_not_usable(cluster: ValkeyCluster) -> None:
    """As servers do by default: those that are left answer, and refuse every key."""
    gone, *left = cluster.primaries
    async with connected(cluster.url) as connection:
        gone.kill()
        try:
            wait_until(lambda: {state(node) for node in left} == {"fail"}, "it to fail")
            with pytest.raises(Unavailable, match="cannot be used"):
                await connection.check()
        finally:
            gone.start()
    wait_until(lambda: {state(node) for node in cluster.nodes} == {"ok"}, "peace")


def state(node: ValkeyProcess) -> str:
    return str(ask(node, "CLUSTER INFO")["cluster_state"])
