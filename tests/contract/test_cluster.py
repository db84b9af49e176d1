"""What only a cluster can do wrong: the stores' other suites are held against it as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import redis.asyncio as redis
from redis.crc import key_slot

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.durability import Durability
from server.store.profiles import ProfileStore
from server.store.redis import keys
from server.store.redis.servers.cluster import Cluster
from server.store.redis.servers.connection import RedisConnection
from tests.support.stored import LATER_MS, change, connected, forgotten, strict_and_lenient, users_at


@pytest.fixture
async def connection(cluster: ValkeyCluster) -> AsyncIterator[RedisConnection]:
    async with connected(cluster.url) as connection:
        yield connection


@contextmanager
def configured(node: ValkeyProcess, name: str, value: str) -> Iterator[None]:
    """A node with another setting, until the block ends."""
    before = ask(node, "CONFIG GET", name)[name]
    ask(node, "CONFIG SET", name, value)
    try:
        yield
    finally:
        ask(node, "CONFIG SET", name, before)
    wait_until(lambda: not rewriting(node), "the file that it begins anew")


def rewriting(node: ValkeyProcess) -> bool:
    info = ask(node, "INFO", "persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


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
            assert await ProfileStore(lenient).commit(next(users_at(cluster, weak)), b"", change("a"))
            assert (f":{weak.port}" in caplog.text) == (expected is Durability.NONE)
            elsewhere = ProfileStore(strict).commit(next(users_at(cluster, cluster.primaries[0])), b"", change("a"))
            for refused in (strict.check(), elsewhere):
                if said:
                    with pytest.raises(Unavailable, match=said.format(ask(weak, "CLUSTER MYID").decode())):
                        await refused
                else:
                    assert await refused
        assert await strict.check() is Durability.ALWAYS


async def test_a_primary_without_a_file_acknowledges_nothing(
    cluster: ValkeyCluster, connection: RedisConnection
) -> None:
    """Before anybody has looked again: a replica without a file may have taken over."""
    weak = cluster.primaries[2]
    with configured(weak, "appendonly", "no"), pytest.raises(Unavailable):
        await ProfileStore(connection).commit(next(users_at(cluster, weak)), b"", change("a"))


async def test_a_write_waits_for_the_disk_on_its_own_connection(
    cluster: ValkeyCluster, connection: RedisConnection
) -> None:
    for home in cluster.primaries:
        key = next(users_at(cluster, home))
        async with redis.from_url(home.url) as raw, raw.monitor() as monitor:
            assert await ProfileStore(connection).commit(key, b"", change("a"))
            seen = monitor.listen()
            async with asyncio.timeout(10):
                heard = [await anext(seen)]
                while not heard[-1]["command"].startswith("WAITAOF"):
                    heard.append(await anext(seen))
        (wrote,) = [one for one in heard if one["command"].startswith("EVAL")]
        assert key in wrote["command"]
        assert wrote["client_port"] == heard[-1]["client_port"]


async def test_a_user_is_read_and_written_while_their_keys_move(
    cluster: ValkeyCluster, connection: RedisConnection
) -> None:
    source, target, other = cluster.primaries
    here, there = (ask(node, "CLUSTER MYID").decode() for node in (source, target))
    key, store = next(users_at(cluster, source)), ProfileStore(connection)
    slot = key_slot(keys.profile(key).encode())
    async with connected(cluster.url) as unaware:
        ask(target, f"CLUSTER SETSLOT {slot} IMPORTING {here}")
        ask(source, f"CLUSTER SETSLOT {slot} MIGRATING {there}")
        await connection.write("return redis.call('RPUSH', KEYS[1], 'a')", (keys.samples(key),))
        assert ask(target, f"CLUSTER COUNTKEYSINSLOT {slot}") == 1  # asked for at the one, written at the other
        # A script on several keys waits for the move to end: no server can tell which of them it has yet.
        sent, reading = calls(target, "asking"), asyncio.create_task(store.read(key))
        while calls(target, "asking") < sent + 12:  # more often than redis-py sends it
            assert not reading.done()
            await asyncio.sleep(0.02)
        writing = asyncio.create_task(store.commit(key, b"", change("a")))
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
        assert await connection.holders(keys.profile(key)) == [there]
    cluster.move(slot, target, source)


async def test_what_was_erased_leaves_the_file_of_the_server_that_held_it(
    cluster: ValkeyCluster, connection: RedisConnection, quick_rewrites: None
) -> None:
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
