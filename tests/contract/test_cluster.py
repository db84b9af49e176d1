"""What only a cluster can do wrong, its servers there, silent or gone; the stores' other suites are held against it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import redis.asyncio as redis
from redis.crc import key_slot

from bench.rig.processes import paused, wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store import jobs as job_store
from server.store import profiles
from server.store.durability import Durability
from server.store.figures import read_figures
from server.store.jobs import JobState, JobStore, Trained
from server.store.profiles import ProfileStore
from server.store.redis import keys
from server.store.redis.scripts import Script
from server.store.redis.servers.base import StoreServer
from server.store.redis.servers.cluster import Cluster
from server.store.redis.servers.connection import REFUSED, RedisConnection
from tests.support.store_parts import (
    LATER_MS,
    REPLICA_TIMEOUT_MS,
    StoreParts,
    WorkerSteps,
    Writing,
    change,
    claimed,
    connected,
    forgotten,
    stored,
    strict_and_lenient,
    submitted,
    users_at,
)
from tests.support.valkeys.cluster import ValkeyCluster, ask

READS = 200  # more than there are places for, on one connection of the stores


@pytest.fixture
async def connection(cluster: ValkeyCluster) -> AsyncIterator[RedisConnection]:
    async with connected(cluster.url) as connection:
        yield connection


@contextmanager
def configured(node: ValkeyProcess, name: str, value: str) -> Iterator[None]:
    before = ask(node, "CONFIG GET", name)[name]
    ask(node, "CONFIG SET", name, value)
    try:
        yield
    finally:
        ask(node, "CONFIG SET", name, before)
    rewriting = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
    wait_until(lambda: not any(map(ask(node, "INFO", "persistence").get, rewriting)), "the file that it begins anew")


def calls(node: ValkeyProcess, command: str) -> int:
    return int(ask(node, "INFO", "commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


@pytest.mark.parametrize(
    ("name", "value", "expected", "said"),
    [
        ("appendfsync", "everysec", Durability.WAITAOF, ""),
        ("appendonly", "no", Durability.NONE, "appendonly yes"),
        ("appendfsync", "no", Durability.NONE, "appendonly yes"),
        ("maxmemory-policy", "allkeys-lru", Durability.EVICTS, "{} allkeys-lru.*maxmemory-policy noeviction"),
    ],
)
async def test_one_server_decides_how_durable_all_are(
    cluster: ValkeyCluster, name: str, value: str, *, expected: Durability, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    weak = cluster.primaries[1]
    async with strict_and_lenient(cluster.url) as (strict, lenient):
        with configured(weak, name, value):
            assert await lenient.check() is expected
            assert await stored(ProfileStore(lenient), next(users_at(cluster, weak)), change("a"))
            assert (f":{weak.port}" in caplog.text) == (expected is Durability.NONE)
            elsewhere = stored(ProfileStore(strict), next(users_at(cluster, cluster.primaries[0])), change("a"))
            for refused in (strict.check(), elsewhere):
                if said:
                    with pytest.raises(Unavailable, match=said.format(ask(weak, "CLUSTER MYID").decode())):
                        await refused
                else:
                    assert await refused
        assert await strict.check() is Durability.ALWAYS
        if name == "appendonly":  # before anybody has looked again: a replica without a file may have taken over
            with configured(weak, "appendonly", "no"), pytest.raises(Unavailable):
                await stored(ProfileStore(strict), next(users_at(cluster, weak)), change("a"))


async def test_a_write_waits_on_its_own_connection(cluster: ValkeyCluster, connection: RedisConnection) -> None:
    for home in cluster.primaries:
        key = next(users_at(cluster, home))
        async with redis.from_url(home.url) as raw, raw.monitor() as monitor:
            assert await stored(ProfileStore(connection), key, change("a"))
            seen = monitor.listen()
            async with asyncio.timeout(10):
                heard = [await anext(seen)]
                while not heard[-1]["command"].startswith("WAITAOF"):
                    heard.append(await anext(seen))
        *_, wrote = [one for one in heard if one["command"].startswith("EVAL")]  # after a mark, which needs no wait
        assert key in wrote["command"]
        assert wrote["client_port"] == heard[-1]["client_port"]


async def test_users_are_served_while_their_keys_move(cluster: ValkeyCluster, connection: RedisConnection) -> None:
    source, target, other = cluster.primaries
    here, there = (ask(node, "CLUSTER MYID").decode() for node in (source, target))
    key, store = next(users_at(cluster, source)), ProfileStore(connection)
    slot = key_slot(keys.profile(key).encode())
    async with connected(cluster.url) as unaware:
        ask(target, f"CLUSTER SETSLOT {slot} IMPORTING {here}")
        ask(source, f"CLUSTER SETSLOT {slot} MIGRATING {there}")
        await connection.write(Script("return redis.call('RPUSH', KEYS[1], 'a')"), (keys.samples(key),))
        assert ask(target, f"CLUSTER COUNTKEYSINSLOT {slot}") == 1  # asked for at the one, written at the other
        # A script on several keys waits for the move to end: no server can tell which of them it has yet.
        sent, reading = calls(target, "asking"), asyncio.create_task(store.read(key))
        while calls(target, "asking") < sent + 12:  # more often than redis-py sends it
            assert not reading.done()
            await asyncio.sleep(0.02)
        writing = asyncio.create_task(stored(store, key, change("a")))
        sent = calls(target, "asking")
        while not calls(target, "asking") > sent + 8:
            await asyncio.sleep(0.02)
        assert not (writing.done() or reading.done())
        for node in (target, source, other):
            ask(node, f"CLUSTER SETSLOT {slot} NODE {there}")
        assert await writing
        await reading
        assert await ProfileStore(unaware).load(key) is not None
        assert await ProfileStore(unaware).erase(key, LATER_MS, 0)
        for moved_or_not in (key, next(users_at(cluster, target))):  # of servers that now hold several ranges of slots
            assert await connection.holders(keys.profile(moved_or_not)) == [there]
    cluster.move(slot, target, source)


@contextmanager
def moving(cluster: ValkeyCluster, key: str) -> Iterator[None]:
    """While a key's slot moves from the first primary to the second; then it is back whole."""
    source, target, _ = cluster.primaries
    here, there = (ask(node, "CLUSTER MYID").decode() for node in (source, target))
    slot = key_slot(key.encode())
    ask(target, f"CLUSTER SETSLOT {slot} IMPORTING {here}")
    ask(source, f"CLUSTER SETSLOT {slot} MIGRATING {there}")
    try:
        yield
    finally:
        cluster.move(slot, source, target)
        cluster.move(slot, target, source)


async def test_a_job_is_found_while_its_keys_move(cluster: ValkeyCluster, connection: RedisConnection) -> None:
    source, target, _ = cluster.primaries
    user, jobs, bank = next(users_at(cluster, source)), JobStore(connection), "0badcafe"
    job = await submitted(jobs, user, bank=bank)
    with moving(cluster, keys.jobs(user)):
        ask(source, "MIGRATE", "127.0.0.1", target.port, keys.jobs(user), 0, 5000)
        found = await jobs.next_job(bank, 1)
    assert found == job.id


async def test_samples_stay_if_a_moving_slot_refuses_more(cluster: ValkeyCluster, connection: RedisConnection) -> None:
    user, jobs = next(users_at(cluster, cluster.primaries[0])), JobStore(connection)
    epoch = await ProfileStore(connection).begin(user)
    job = await submitted(jobs, user, epoch=epoch)
    with moving(cluster, keys.jobs(user)), pytest.raises(Unavailable):
        await submitted(jobs, user, "another", epoch=epoch)
    assert (await jobs.samples(user), await jobs.jobs(user)) == ([b"a"], [job])


async def test_an_adapter_is_replaced_in_a_moving_slot(cluster: ValkeyCluster) -> None:
    user = next(users_at(cluster, cluster.primaries[0]))
    async with StoreParts.opened(cluster.url) as parts:
        worker = WorkerSteps(parts, "0badcaf1")
        epoch = await parts.profiles.begin(user)
        await parts.profiles.commit(user, b"", change("a"), epoch)
        for sample, place in (("a", nullcontext()), ("b", moving(cluster, keys.adapter(user)))):
            await submitted(parts.jobs, user, sample, bank=worker.bank, epoch=epoch)
            await worker.take()
            await worker.claim()
            with place:
                promoted = await worker.promote()
        assert promoted == await parts.adapters.adapter_id(user) is not None


@pytest.mark.usefixtures("quick_rewrites")
async def test_one_file_is_rewritten_for_an_erasure(cluster: ValkeyCluster, connection: RedisConnection) -> None:
    async with cluster.client() as raw:
        await raw.flushall()  # what other tests had due
    home = cluster.primaries[1]
    others = [node for node in cluster.nodes if node is not home]
    before = [ask(node, "INFO", "persistence")["aof_rewrites"] for node in others]
    await forgotten(connection, next(users_at(cluster, home)), home)
    assert [ask(node, "INFO", "persistence")["aof_rewrites"] for node in others] == before


async def test_a_url_names_hosts_a_login_and_how_to_encrypt() -> None:
    client = Cluster("rediss+cluster://me:s%40cret@one:7000,two?ssl_check_hostname=false")._client
    assert sorted(client.nodes_manager.startup_nodes) == ["one:7000", "two:6379"]
    kept = client.connection_kwargs
    assert (kept["username"], kept["password"]) == ("me", "s@cret")
    assert kept["connection_class"].__name__ == "SSLConnection"


@pytest.fixture
async def to_followed(followed: ValkeyCluster) -> AsyncIterator[RedisConnection]:
    wait_until(lambda: all(map(followed.lists_replicas, followed.nodes)), "the replica to be back")
    async with connected(followed.url) as connection:
        yield connection


async def test_a_write_without_a_replica_is_not_acknowledged(
    followed: ValkeyCluster, to_followed: RedisConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, store = users_at(followed, followed.primaries[0]), ProfileStore(to_followed)
    assert await stored(store, next(users), change("a"))
    monkeypatch.setattr(REPLICA_TIMEOUT_MS, 100)
    with paused(followed.replicas[0].pid):
        with pytest.raises(Unavailable, match="on a replica"):
            await stored(store, next(users), change("a"))
        elsewhere = next(users_at(followed, followed.primaries[1]))
        assert await stored(store, elsewhere, change("a"))
        monkeypatch.setattr("server.store.redis.servers.cluster.REFRESH_S", 3600.0)
        wait_until(lambda: not followed.lists_replicas(followed.primaries[1]), "the replica to count as failed")
        with pytest.raises(Unavailable, match="on a replica"):
            await stored(store, next(users), change("a"))
        assert await stored(store, next(users), change("a"))  # nobody waits for it any more


async def test_nor_is_one_that_is_sent_again(
    followed: ValkeyCluster, to_followed: RedisConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server waits for what a connection wrote: for nothing, if all is already as it should be."""
    users, written, write = users_at(followed, followed.primaries[0]), dict[str, tuple[Any, ...]](), to_followed.write
    user, erased = next(users), next(users)

    async def noted(script: str, *arguments: Any) -> Any:
        written[script] = arguments
        return await write(script, *arguments)

    to_followed.write = noted  # type: ignore[method-assign]
    store, jobs = ProfileStore(to_followed), JobStore(to_followed)
    await stored(store, user, change("a"))
    await store.wait_until_durable(user)
    await store.erase(erased, LATER_MS, 0)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    await jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))
    await jobs.cancel((await submitted(jobs, user)).id)
    await submitted(jobs, user)
    said = (
        profiles._COMMIT,
        profiles._WRITE_AGAIN,
        profiles._ERASE,
        job_store._SUBMIT,
        job_store._CANCEL,
        job_store._END,
    )
    for script in said:
        wait_until(lambda: all(map(followed.lists_replicas, followed.nodes)), "the replica to be back")
        await to_followed.check()
        with paused(followed.replicas[0].pid), monkeypatch.context() as briefly:
            briefly.setattr(REPLICA_TIMEOUT_MS, 100)
            with pytest.raises(Unavailable, match="on a replica"):
                await write(script, *written[script])


async def test_check_finds_replicas_lost_to_a_redirection(to_followed: RedisConnection) -> None:
    manager = to_followed._servers._client.nodes_manager  # type: ignore[attr-defined]
    manager.slots_cache[1] = manager.slots_cache[1][:1]  # what redis-py makes of a slot when a read is sent elsewhere
    await to_followed.check()
    slots = manager.slots_cache
    assert [len(slots[slot]) for slot in (0, 1, 2)] == [2, 2, 2]


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_acknowledged_writes_survive_a_replica_takeover(
    followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch, *, silent: bool
) -> None:
    monkeypatch.setattr("server.store.redis.servers.connection.WRITE_TIMEOUT_S", 3.0)
    monkeypatch.setattr("server.store.redis.servers.cluster.REFRESH_S", 1.0)
    pair = (followed.primaries[0], followed.replicas[0])
    (lost,) = [node for node in pair if ask(node, "ROLE")[0] == b"master"]
    users = list(itertools.islice(users_at(followed, followed.primaries[0]), 4))
    async with connected(followed.url) as connection, asyncio.timeout(120):
        async with Writing(ProfileStore(connection), users) as writing:
            await writing.goes_on()
            os.kill(lost.pid, signal.SIGSTOP) if silent else lost.kill()
            await writing.goes_on()
        os.kill(lost.pid, signal.SIGCONT) if silent else lost.start()
        while not all(map(followed.lists_replicas, followed.nodes)):
            await asyncio.sleep(0.1)
        assert len(await connection.holders(keys.profile(users[0]))) == 2
        assert await connection.check() is Durability.ALWAYS


def state(node: ValkeyProcess) -> str:
    return str(ask(node, "CLUSTER INFO")["cluster_state"])


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_who_lives_elsewhere_is_served(
    followed: ValkeyCluster, monkeypatch: pytest.MonkeyPatch, *, silent: bool
) -> None:
    monkeypatch.setattr("server.store.redis.servers.connection.CHECK_TIMEOUT_S", 30.0)
    gone, there = followed.primaries[1:]
    lost, served = next(users_at(followed, gone)), next(users_at(followed, there))
    async with connected(followed.url) as connection:
        store = ProfileStore(connection)
        assert connection.unserved is None
        with paused(*([gone.pid] if silent else [])):
            if not silent:
                gone.kill()
            assert await connection.check() is Durability.ALWAYS
            assert "33% of all users cannot be served" in str(connection.unserved)
            assert f"127.0.0.1:{gone.port}" in str(connection.unserved)
            reading = [asyncio.create_task(store.load(lost)) for _ in range(READS)]
            writing = [asyncio.create_task(stored(store, lost, change("a"))) for _ in range(READS)]
            await asyncio.sleep(0)
            assert await stored(store, served, change("a"))
            assert await store.load(served) is not None
            refused = await asyncio.gather(*reading, *writing, return_exceptions=True)
            assert {error.code for error in refused if isinstance(error, Unavailable)} == {"store_unavailable"}
            assert all(isinstance(error, Unavailable) for error in refused)
        if not silent:
            gone.start()
        wait_until(lambda: {state(node) for node in followed.nodes} == {"ok"}, "peace")
        await connection.check()
        assert connection.unserved is None
        assert await stored(store, lost, change("a"))


async def test_a_cluster_that_serves_a_third_is_no_store(followed: ValkeyCluster, cluster: ValkeyCluster) -> None:
    """By default nobody is served once a primary is gone: those that are left answer, and refuse every key."""
    gone, *left = cluster.primaries
    async with connected(followed.url) as most_gone, connected(cluster.url) as one_gone:
        for each in (*followed.primaries[1:], gone):
            each.kill()
        try:
            wait_until(lambda: {state(node) for node in left} == {"fail"}, "it to fail")
            for connection in (most_gone, one_gone):
                with pytest.raises(Unavailable, match="cannot be used"):
                    await connection.check()
        finally:
            gone.start()
    wait_until(lambda: {state(node) for node in cluster.nodes} == {"ok"}, "peace")


async def test_read_figures_reports_each_server_but_a_refusing_one(
    cluster: ValkeyCluster, connection: RedisConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "words-that-nobody-shall-find-in-a-figure"
    await connection.run(lambda redis: redis.set(secret, secret))
    found = {report.server: report for report in await read_figures(connection)}
    assert len(found) == len(cluster.nodes)
    assert sum(report.replicas for report in found.values()) == len(cluster.replicas)
    assert all(0 < report.used_bytes <= report.resident_bytes * 4 for report in found.values())
    assert not any(report.rewrite_failed for report in found.values())
    assert sum(report.commands["set"][0] for report in found.values() if "set" in report.commands) >= 1
    assert secret not in repr(found)
    refusing, send = next(iter(found)), connection.send

    async def send_or_refuse(server: StoreServer, *command: str) -> Any:
        if server.id == refusing:
            raise Unavailable("it may not run INFO", code=REFUSED)
        return await send(server, *command)

    monkeypatch.setattr(connection, "send", send_or_refuse)
    assert {report.server for report in await read_figures(connection)} == found.keys() - {refusing}
