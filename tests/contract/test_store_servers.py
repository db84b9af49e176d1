"""What a store takes of a server: how its writes last, that it dies, comes back or is another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.errors import MtaError
from bench.rig.cluster import ask
from bench.rig.processes import wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.errors import Unavailable
from server.store.durability import Durability
from server.store.profiles import ProfileStore
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import StoreParts
from tests.support.stored import LATER_MS, change, connected, strict_and_lenient

Start = Callable[..., ValkeyProcess]
Pair = tuple[ValkeyProcess, ValkeyProcess]
EVERYSEC = ("--appendonly", "yes", "--appendfsync", "everysec")


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server with the given options; all are killed when the test ends."""
    running: list[ValkeyProcess] = []

    def start(*options: str) -> ValkeyProcess:
        running.append(ValkeyProcess(tmp_path_factory.mktemp("server"), options).start())
        return running[-1]

    yield start
    for server in running:
        server.kill()


HIDDEN = ("--rename-command", "CONFIG", "")
"""As managed services do."""


@pytest.mark.parametrize(
    ("options", "expected", "waits"),
    [(DURABLE, Durability.ALWAYS, 0), (EVERYSEC, Durability.WAITAOF, 1), ((*DURABLE, *HIDDEN), Durability.WAITAOF, 1)],
)
async def test_a_durable_server_is_taken_and_waited_for(
    start_server: Start, options: tuple[str, ...], expected: Durability, waits: int, user: str
) -> None:
    server = start_server(*options)
    async with connected(server.url) as connection, server.client() as raw:

        async def calls() -> list[int]:
            stats = await raw.info("commandstats")
            return [stats.get(f"cmdstat_{command}", {"calls": 0})["calls"] for command in ("eval", "waitaof")]

        assert connection.durability is expected
        store = ProfileStore(connection)
        for write in (store.commit(user, b"", change("a")), store.erase(user, LATER_MS, 0)):
            evals, waited = await calls()
            assert await write
            assert await calls() == [evals + 1, waited + waits]


LOSES = [
    ("--appendonly", "no"),
    ("--appendonly", "yes", "--appendfsync", "no"),
    ("--appendonly", "no", *HIDDEN),
]
POLICIES = (("allkeys-lru",), ("volatile-ttl",), ("allkeys-random", *HIDDEN))
EVICTS = [(*DURABLE, *hidden, "--maxmemory-policy", policy) for policy, *hidden in POLICIES]


@pytest.mark.parametrize(
    ("options", "said"),
    [(options, "appendonly yes") for options in LOSES]
    + [(options, f"{options[-1]}.*`maxmemory-policy noeviction`") for options in EVICTS],
)
async def test_a_server_that_may_lose_or_evict_is_refused(
    start_server: Start, options: tuple[str, ...], said: str, user: str
) -> None:
    async with strict_and_lenient(start_server(*options).url) as (strict, lenient):
        for refused in (strict.check(), ProfileStore(strict).commit(user, b"", change("a"))):
            with pytest.raises(Unavailable, match=said) as caught:
                await refused
            assert caught.value.code == "store_not_durable"
        assert await lenient.check() is (Durability.NONE if options in LOSES else Durability.EVICTS)
        assert await ProfileStore(lenient).commit(user, b"", change("a"))


async def test_a_server_that_begins_to_evict_is_noticed(start_server: Start, user: str) -> None:
    server = start_server(*DURABLE)
    async with connected(server.url) as connection, server.client() as raw:
        await raw.config_set("maxmemory-policy", "allkeys-lru")
        for refused in (connection.check(), ProfileStore(connection).commit(user, b"", change("a"))):
            with pytest.raises(Unavailable, match="allkeys-lru"):
                await refused
        await raw.config_set("maxmemory-policy", "noeviction")
        await connection.check()
        assert await ProfileStore(connection).commit(user, b"", change("a"))


async def test_a_restarted_server_is_used_again(start_server: Start, user: str) -> None:
    server = start_server(*DURABLE)
    async with connected(server.url) as connection:
        store = ProfileStore(connection)
        await store.commit(user, b"", change("a"))
        server.kill()
        for attempt in (store.load(user), store.read(user), store.erase(user, LATER_MS, 0), connection.check()):
            with pytest.raises(Unavailable) as caught:
                await attempt
            assert caught.value.headers["Retry-After"]
        server.start()
        assert await store.load(user) is not None


OF_A_CLUSTER = ["redis+cluster://", "redis+cluster://a,,b", "redis+cluster://a:7000/3", "redis+c://a"]


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "", *OF_A_CLUSTER])
async def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(MtaError, match="MTA_REDIS_URL"):
        RedisConnection(url)


async def test_who_is_cancelled_amid_a_call_ends(server: ValkeyProcess) -> None:
    async with StoreParts.opened(server.url) as parts:

        async def ask() -> None:
            while True:
                await parts.profiles.epoch("somebody")

        asking = [asyncio.create_task(ask()) for _ in range(40)]
        await asyncio.sleep(0.2)
        for task in asking:
            task.cancel()
        _, left = await asyncio.wait(asking, timeout=10)
        for task in left:
            task.cancel()
        assert not left


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """A primary, and a replica that has all it has."""
    options = (*DURABLE, "--repl-diskless-sync-delay", "0", "--repl-diskless-load", "swapdb")
    primary, replica = (ValkeyProcess(tmp_path / name, options).start() for name in ("primary", "replica"))
    ask(replica, "REPLICAOF", "127.0.0.1", primary.port)
    wait_until(lambda: ask(replica, "ROLE")[3] == b"connected", "the replica to follow")
    yield primary, replica
    primary.kill()
    replica.kill()


def fail_over(primary: ValkeyProcess, replica: ValkeyProcess) -> None:
    ask(primary, "FAILOVER", "TO", "127.0.0.1", replica.port)
    wait_until(lambda: ask(primary, "ROLE")[0] == b"slave", "the replica to take over")


async def test_a_write_that_meets_a_replica_goes_to_the_new_primary(pair: Pair, user: str) -> None:
    primary, replica = pair
    with LossyProxy(primary.port) as address:
        async with connected(f"redis://127.0.0.1:{address.port}") as connection:
            store = ProfileStore(connection)
            assert await store.commit(user, b"", change("a"))
            fail_over(primary, replica)
            address.to_port = replica.port
            snapshot = await store.read(user)  # of the old one: its connection stands
            assert await store.commit(user, snapshot.version, change("b"))
            assert list((await store.read(user)).items) == ["a", "b"]


async def test_a_check_that_meets_a_replica_reconnects(pair: Pair) -> None:
    primary, replica = pair
    with LossyProxy(primary.port) as address:
        async with connected(f"redis://127.0.0.1:{address.port}") as connection:
            fail_over(primary, replica)
            address.to_port = replica.port
            assert await connection.check() is Durability.ALWAYS
            info = await connection.run(lambda redis: redis.info("server"))
            assert info["tcp_port"] == replica.port


async def test_a_replica_is_no_store_until_it_takes_writes(pair: Pair, user: str) -> None:
    primary, replica = pair
    async with strict_and_lenient(replica.url) as (connection, _):
        with pytest.raises(Unavailable) as caught:
            await connection.check()
        assert caught.value.code == "store_unavailable"
        assert f"it is a replica of 127.0.0.1:{primary.port}" in caught.value.explained
        ask(replica, "REPLICAOF", "NO", "ONE")
        assert await connection.check() is Durability.ALWAYS
        assert await ProfileStore(connection).commit(user, b"", change("a"))
