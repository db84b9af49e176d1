"""What a store takes of a server: how its writes last, that it dies, comes back or is another, also by Sentinel."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from adapters.errors import MtaError
from bench.rig.processes import paused, wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.valkey import DURABLE, ValkeyProcess, free_port, server_binaries
from server.errors import Unavailable
from server.store.append_only_file import AppendOnlyFile
from server.store.backup.copying import StoreCopying
from server.store.backup.folder import user_of
from server.store.durability import Durability
from server.store.profiles import ProfileStore
from server.store.redis.servers.connection import RedisConnection
from server.store.redis.servers.sentinel import Sentinel
from tests.support.store_parts import (
    KEYS,
    LATER_MS,
    REPLICA_TIMEOUT_MS,
    Writing,
    change,
    connected,
    forgotten,
    on_disk,
    opened,
    stored,
    strict_and_lenient,
)
from tests.support.valkeys.cluster import ask
from tests.support.valkeys.sentinels import SERVICE, WatchedValkey

Start, Options = Callable[..., ValkeyProcess], tuple[str, ...]
EVERYSEC = ("--appendonly", "yes", "--appendfsync", "everysec")
HIDDEN = ("--rename-command", "CONFIG", "")  # as managed services do


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    running: list[ValkeyProcess] = []

    def started(*options: str) -> ValkeyProcess:
        running.append(ValkeyProcess(tmp_path_factory.mktemp("server"), options).start())
        return running[-1]

    yield started
    for server in running:
        server.kill()


@pytest.mark.parametrize(
    ("options", "expected", "waits"),
    [(DURABLE, Durability.ALWAYS, 0), (EVERYSEC, Durability.WAITAOF, 1), ((*DURABLE, *HIDDEN), Durability.WAITAOF, 1)],
)
async def test_a_durable_server_is_waited_for(start: Start, options: Options, expected: Durability, waits: int) -> None:
    server, user = start(*options), "somebody"
    async with connected(server.url) as connection, server.client() as raw:

        async def calls() -> list[int]:
            stats = await raw.info("commandstats")
            return [stats.get(f"cmdstat_{command}", {"calls": 0})["calls"] for command in ("evalsha", "waitaof")]

        assert connection.durability is expected
        store = ProfileStore(connection)
        await stored(store, "another", change("a"))  # from now on the server knows the scripts
        await store.erase("another", LATER_MS, 0)
        mark = await store.begin(user)
        for write in (store.commit(user, b"", change("a"), mark), store.erase(user, LATER_MS, 0)):
            evals, waited = await calls()
            assert await write
            assert await calls() == [evals + 1, waited + waits]


LOSES = [("--appendonly", "no"), ("--appendonly", "yes", "--appendfsync", "no"), ("--appendonly", "no", *HIDDEN)]
POLICIES = (("allkeys-lru",), ("volatile-ttl",), ("allkeys-random", *HIDDEN))
EVICTS = [(*DURABLE, *hidden, "--maxmemory-policy", policy) for policy, *hidden in POLICIES]


@pytest.mark.parametrize(
    ("options", "said"),
    [(options, "appendonly yes") for options in LOSES]
    + [(options, f"{options[-1]}.*`maxmemory-policy noeviction`") for options in EVICTS],
)
async def test_a_server_that_may_lose_or_evict_is_refused(start: Start, options: Options, said: str, user: str) -> None:
    async with strict_and_lenient(start(*options).url) as (strict, lenient):
        for refused in (strict.check(), stored(ProfileStore(strict), user, change("a"))):
            with pytest.raises(Unavailable, match=said) as caught:
                await refused
            assert caught.value.code == "store_not_durable"
        assert await lenient.check() is (Durability.NONE if options in LOSES else Durability.EVICTS)
        assert await stored(ProfileStore(lenient), user, change("a"))


async def test_evicting_or_restarted_server_is_noticed(start: Start, user: str) -> None:
    server = start(*DURABLE)
    async with connected(server.url) as connection:
        store = ProfileStore(connection)
        ask(server, "CONFIG SET", "maxmemory-policy", "allkeys-lru")
        for refused in (connection.check(), stored(store, user, change("a"))):
            with pytest.raises(Unavailable, match="allkeys-lru"):
                await refused
        ask(server, "CONFIG SET", "maxmemory-policy", "noeviction")
        await connection.check()
        assert await stored(store, user, change("a"))
        server.kill()
        for attempt in (store.load(user), store.read(user), store.erase(user, LATER_MS, 0), connection.check()):
            with pytest.raises(Unavailable) as caught:
                await attempt
            assert caught.value.headers["Retry-After"]
        server.start()
        assert await store.load(user) is not None


async def test_who_is_cancelled_amid_a_call_ends(server: ValkeyProcess) -> None:
    async with opened(server.url) as store:

        async def read() -> None:
            while True:
                await store.begin("somebody")

        asking = [asyncio.create_task(read()) for _ in range(40)]
        await asyncio.sleep(0.2)
        for task in asking:
            task.cancel()
        _, left = await asyncio.wait(asking, timeout=10)
        for task in left:
            task.cancel()
        assert not left


async def test_replica_is_refused_and_failover_address_is_followed(tmp_path: Path) -> None:
    options = (*DURABLE, "--repl-diskless-sync-delay", "0", "--repl-diskless-load", "swapdb")
    primary, replica = (ValkeyProcess(tmp_path / name, options).start() for name in ("primary", "replica"))
    ask(replica, "REPLICAOF", "127.0.0.1", primary.port)
    wait_until(lambda: ask(primary, "ROLE")[2], "the primary to have heard from its replica")
    try:
        async with strict_and_lenient(replica.url) as (connection, _):
            with pytest.raises(Unavailable) as caught:
                await connection.check()
            assert caught.value.code == "store_unavailable"
            assert f"it is a replica of 127.0.0.1:{primary.port}" in caught.value.explained
        with LossyProxy(primary.port) as address:
            url, user = f"redis://127.0.0.1:{address.port}", "somebody"
            async with connected(url) as connection, connected(url) as checking:
                store = ProfileStore(connection)
                assert await stored(store, user, change("a"))
                ask(primary, "FAILOVER", "TO", "127.0.0.1", replica.port)
                wait_until(lambda: ask(primary, "ROLE")[0] == b"slave", "the replica to take over")
                address.to_port = replica.port
                snapshot = await store.read(user)  # of the old one: its connection stands
                assert await store.commit(user, snapshot.version, change("b"))
                assert list((await store.read(user)).items) == ["a", "b"]
                assert await checking.check() is Durability.ALWAYS
                assert (await checking.run(lambda redis: redis.info("server")))["tcp_port"] == replica.port
        async with strict_and_lenient(primary.url) as (connection, _):
            ask(primary, "REPLICAOF", "NO", "ONE")
            assert await connection.check() is Durability.ALWAYS
            assert await stored(ProfileStore(connection), "another", change("a"))
    finally:
        primary.kill()
        replica.kill()


@pytest.mark.parametrize("binary", server_binaries().values(), ids=server_binaries())
def test_a_replica_keeps_no_file_that_it_was_synchronised_from(binary: Path, tmp_path: Path) -> None:
    options = (*DURABLE, "--rdb-del-sync-files", "yes", "--repl-diskless-sync-delay", "0")
    primary, replica = (ValkeyProcess(tmp_path / name, options, binary) for name in ("primary", "replica"))
    with primary, replica:
        ask(replica, "REPLICAOF", "127.0.0.1", primary.port)
        wait_until(lambda: ask(replica, "ROLE")[3] == b"connected", "the replica to be synchronised")
        assert not list(replica.folder.glob("*.rdb"))


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


async def test_a_write_waits_for_the_replica_until_it_is_down(
    watched: WatchedValkey, connection: RedisConnection, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REPLICA_TIMEOUT_MS, 100)
    store = ProfileStore(connection)
    assert not connection.reads_are_durable
    with paused(watched.replica.pid):
        with pytest.raises(Unavailable, match="on a replica"):
            await stored(store, user, change("a"))
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


@pytest.mark.usefixtures("quick_rewrites")
async def test_an_erasure_leaves_both_files(watched: WatchedValkey, connection: RedisConnection, user: str) -> None:
    await forgotten(connection, user, *watched.servers)


@pytest.mark.usefixtures("quick_rewrites")
async def test_the_file_of_a_replica_that_is_down_is_overdue(
    watched: WatchedValkey, connection: RedisConnection, user: str
) -> None:
    store, file = ProfileStore(connection), AppendOnlyFile(connection)
    await stored(store, user, change("a", user_id="somebody unmistakable"))
    watched.replica.kill()
    async with asyncio.timeout(60):
        while len(await connection.members()) > 1:
            await asyncio.sleep(0.1)
        asked = await file.announce(user)
        assert await store.erase(user, asked.erase_by_ms, asked.rewritten_by_ms)
        while on_disk("unmistakable", watched.primary) or not await file.overdue_s():
            await file.rewrite_if_due()
            await asyncio.sleep(0.05)
        assert on_disk("unmistakable", watched.replica)
        watched.replica.start()
        watched.follow()
        while on_disk("unmistakable", watched.replica) or await file.overdue_s():
            with suppress(Unavailable):
                await file.rewrite_if_due()
            await asyncio.sleep(0.05)


async def test_a_copy_is_read_from_the_primary_alone(watched: WatchedValkey, connection: RedisConnection) -> None:
    users = {KEYS.key(f"copied-{n}") for n in range(20)}
    for user in users:
        await stored(ProfileStore(connection), user, change("a"))
    copied = [user_of(entry) async for entry in StoreCopying(connection).entries(lambda done, of: None)]
    assert {user: copied.count(user) for user in users} == dict.fromkeys(users, 1)


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
async def test_writes_go_on_and_nothing_acknowledged_is_lost(
    watched: WatchedValkey, connection: RedisConnection, user: str, monkeypatch: pytest.MonkeyPatch, *, silent: bool
) -> None:
    patience = {"connection.WRITE_TIMEOUT_S": 3.0, "base.REPLICA_TIMEOUT_MS": 300, "sentinel.REFRESH_S": 1.0}
    for name, value in patience.items():
        monkeypatch.setattr(f"server.store.redis.servers.{name}", value)
    lost, promoted = watched.primary, watched.replica
    async with asyncio.timeout(120), Writing(ProfileStore(connection), [user]) as writing:
        await writing.goes_on()
        os.kill(lost.pid, signal.SIGSTOP) if silent else lost.kill()
        await writing.goes_on()
        os.kill(lost.pid, signal.SIGCONT) if silent else lost.start()
        watched.primary, watched.replica = promoted, lost
        watched.follow()  # Sentinel would see to it after eight seconds
        while not watched.knows_all:
            await asyncio.sleep(0.1)
    assert ask(promoted, "ROLE")[0] == b"master"
    assert await connection.check() is Durability.ALWAYS
    assert len(await connection.members()) == 2


async def test_a_sentinel_that_is_away_or_does_not_know_is_passed_over(watched: WatchedValkey, user: str) -> None:
    async with opened(watched.url.replace("://", f"://127.0.0.1:{free_port()},")) as store:
        assert await stored(store, user, change("a"))
        assert await store.erase(user, LATER_MS, 0)
    with pytest.raises(Unavailable) as caught:
        async with connected(watched.url.replace(SERVICE, "others")):
            raise AssertionError
    assert "no Sentinel knows a primary of 'others'" in caught.value.explained


@pytest.mark.parametrize(
    ("url", "said"),
    [
        *((url, "MTA_REDIS_URL") for url in ("http://localhost", "localhost:6379", "", "redis+c://a")),
        *((f"redis+cluster://{hosts}", "MTA_REDIS_URL") for hosts in ("", "a,,b", "a:7000/3")),
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
async def test_what_is_no_url_of_a_store_is_refused(url: str, said: str) -> None:
    with pytest.raises(MtaError, match=said):
        RedisConnection(url)


def test_a_url_of_sentinels_says_who_is_who() -> None:
    """The servers' login is not sent to the Sentinels, who have their own."""
    options = "ssl_check_hostname=false&sentinel_password=x%2F"
    servers = Sentinel(f"rediss+sentinel://me:p%40ss@one:1,[::1]:2/users/3?{options}")
    sentinels = [each.connection_pool.connection_kwargs for each in servers._sentinels]
    found = [(each["host"], each["port"], each["password"], "db" in each) for each in sentinels]
    assert found == [("one", 1, "x/", False), ("::1", 2, "x/", False)]
    kept = servers._server("fe80::1:6379")._client.connection_pool.connection_kwargs
    assert (kept["host"], kept["port"], kept["db"]) == ("fe80::1", 6379, 3)
    assert (kept["username"], kept["password"], kept["ssl_check_hostname"]) == ("me", "p@ss", False)
