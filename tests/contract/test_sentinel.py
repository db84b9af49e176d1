"""A primary, a replica and three Sentinels: who is written to, who has what was acknowledged, and who takes over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from adapters.errors import MtaError
from bench.rig.cluster import ask
from bench.rig.processes import paused, wait_until
from bench.rig.valkey import free_port
from bench.rig.watched import SERVICE, WatchedValkey
from server.errors import Unavailable
from server.store.durability import Durability
from server.store.profiles import ProfileStore
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from server.store.redis.servers.sentinel import Sentinel
from tests.support.stored import LATER_MS, Writing, change, connected, forgotten, opened


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedValkey]:
    running = WatchedValkey(tmp_path_factory.mktemp("watched"), sentinels=3).start()
    yield running
    running.kill()


@pytest.fixture
async def connection(watched: WatchedValkey) -> AsyncIterator[RedisConnection]:
    async with connected(watched.url) as connection:
        assert connection.durability is Durability.ALWAYS
        yield connection


async def test_what_the_primary_acknowledges_its_replica_has(
    watched: WatchedValkey, connection: RedisConnection, user: str
) -> None:
    store = ProfileStore(connection)
    assert not connection.reads_are_durable
    for number in range(20):
        assert await store.commit(user, (await store.read(user)).version, change(chr(97 + number)))
        assert ask(watched.replica, "HLEN", keys.items(user)) == number + 1


async def test_a_write_waits_for_the_replica_until_it_is_down(
    watched: WatchedValkey, connection: RedisConnection, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.servers.base.REPLICA_TIMEOUT_MS", 100)
    store = ProfileStore(connection)
    with paused(watched.replica.pid):
        with pytest.raises(Unavailable, match="on a replica"):
            await store.commit(user, b"", change("a"))
        async with asyncio.timeout(60):
            while True:
                try:
                    await store.wait_until_durable(user)
                except Unavailable:
                    await asyncio.sleep(0.1)
                else:
                    break
    wait_until(lambda: watched.knows_all, "the replica to be back")
    await connection.check()
    assert len(await connection.members()) == 2


async def test_what_was_erased_leaves_the_files_of_both(
    watched: WatchedValkey, connection: RedisConnection, user: str, quick_rewrites: None
) -> None:
    await forgotten(connection, user, *watched.servers)


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_writes_go_on_and_nothing_acknowledged_is_lost(
    watched: WatchedValkey, connection: RedisConnection, user: str, monkeypatch: pytest.MonkeyPatch, *, silent: bool
) -> None:
    patience = {"connection.WRITE_TIMEOUT_S": 3.0, "base.REPLICA_TIMEOUT_MS": 300, "sentinel.REFRESH_S": 1.0}
    for name, value in patience.items():
        monkeypatch.setattr(f"server.store.redis.servers.{name}", value)
    lost, promoted = watched.primary, watched.replica
    writing = Writing(ProfileStore(connection), [user])
    async with asyncio.timeout(120), writing:
        await writing.goes_on()
        os.kill(lost.pid, signal.SIGSTOP) if silent else lost.kill()
        await writing.goes_on()
        os.kill(lost.pid, signal.SIGCONT) if silent else lost.start()
        watched.primary, watched.replica = promoted, lost
        watched.follow()  # Sentinel would see to it after eight seconds
        while not watched.knows_all:
            await asyncio.sleep(0.1)
    await writing.check()
    assert ask(promoted, "ROLE")[0] == b"master"
    assert await connection.check() is Durability.ALWAYS
    assert len(await connection.members()) == 2


async def test_who_was_the_primary_acknowledges_nothing_when_it_wakes(
    watched: WatchedValkey, connection: RedisConnection, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replica has taken over, and it has not heard of it: nobody follows it."""
    store = ProfileStore(connection)
    assert await store.commit(user, b"", change("a"))
    monkeypatch.setattr("server.store.redis.servers.base.REPLICA_TIMEOUT_MS", 100)
    ask(watched.replica, "REPLICAOF", "NO", "ONE")
    with pytest.raises(Unavailable, match="on a replica"):
        await store.commit(user, (await store.read(user)).version, change("b"))
    watched.follow()


async def test_nobody_is_asked_whom_sentinel_does_not_know(watched: WatchedValkey) -> None:
    with pytest.raises(Unavailable) as caught:
        async with connected(watched.url.replace(SERVICE, "others")):
            raise AssertionError
    assert "no Sentinel knows a primary of 'others'" in caught.value.explained


async def test_a_sentinel_that_is_away_is_passed_over(watched: WatchedValkey, user: str) -> None:
    async with opened(watched.url.replace("://", f"://127.0.0.1:{free_port()},")) as store:
        assert await store.commit(user, b"", change("a"))
        assert (await store.erase(user, LATER_MS, 0)) is not None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+sentinel://a:26379", "names no service"),
        ("redis+sentinel://a:26379/", "names no service"),
        ("redis+sentinel://a/users", "needs host and port, got 'a'"),
        ("redis+sentinel:///users", "needs host and port, got ''"),
        ("redis+sentinel://a:26379,,b:26379/users", "needs host and port, got ''"),
        ("redis+sentinel://a:port/users", "port"),
        ("redis+sentinel://a:26379/users/first", "'first' is not a database number"),
        ("redis+sentinel://a:26379/users?socket_timeout=long", "socket_timeout"),
    ],
)
def test_what_is_no_url_of_sentinels_is_refused(url: str, said: str) -> None:
    with pytest.raises(MtaError, match=said):
        RedisConnection(url)


def test_a_url_says_who_is_who() -> None:
    """The servers' login is not sent to the Sentinels, who have their own."""
    servers = Sentinel(
        "rediss+sentinel://me:p%40ss@one:1,[::1]:2/users/3?ssl_check_hostname=false&sentinel_password=x%2F"
    )
    sentinels = [each.connection_pool.connection_kwargs for each in servers._sentinels]
    assert [(each["host"], each["port"], each["password"], "db" in each) for each in sentinels] == [
        ("one", 1, "x/", False),
        ("::1", 2, "x/", False),
    ]
    kept = servers._server("fe80::1:6379")._client.connection_pool.connection_kwargs
    assert (kept["host"], kept["port"], kept["db"]) == ("fe80::1", 6379, 3)
    assert (kept["username"], kept["password"], kept["ssl_check_hostname"]) == ("me", "p@ss", False)
