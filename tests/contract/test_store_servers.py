"""What a store takes of a server: how its writes last, that it dies and comes back, that a caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from adapters.errors import MtaError
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.errors import Unavailable
from server.store.durability import Durability
from server.store.redis.profiles import RedisProfiles
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import StoreParts
from tests.support.stored import LATER_MS, change, connected, opened, strict_and_lenient

EVERYSEC = ("--appendonly", "yes", "--appendfsync", "everysec")


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ValkeyProcess]]:
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
    ("options", "expected"),
    [(DURABLE, Durability.ALWAYS), (EVERYSEC, Durability.WAITAOF), ((*DURABLE, *HIDDEN), Durability.WAITAOF)],
)
async def test_a_server_that_keeps_what_it_acknowledges_is_taken(
    start_server: Callable[..., ValkeyProcess], options: tuple[str, ...], expected: Durability, user: str
) -> None:
    async with connected(start_server(*options).url) as connection:
        assert connection.durability is expected
        store = RedisProfiles(connection)
        assert await store.commit(user, b"", change("a"))
        assert (await store.erase(user, LATER_MS, 0)) is not None


LOSES = [
    ("--appendonly", "no"),
    ("--appendonly", "yes", "--appendfsync", "no"),
    ("--appendonly", "no", *HIDDEN),
]
POLICIES = ("allkeys-lru", "volatile-lru", "volatile-ttl", "allkeys-random")
EVICTS = [(*DURABLE, *hidden, "--maxmemory-policy", policy) for hidden in ((), HIDDEN) for policy in POLICIES]


@pytest.mark.parametrize(
    ("options", "said"),
    [(options, "appendonly yes") for options in LOSES]
    + [(options, f"{options[-1]}.*`maxmemory-policy noeviction`") for options in EVICTS],
)
async def test_a_server_that_may_lose_or_evict_is_refused_or_on_request_only_noted(
    start_server: Callable[..., ValkeyProcess], options: tuple[str, ...], said: str, user: str
) -> None:
    async with strict_and_lenient(start_server(*options).url) as (strict, lenient):
        for refused in (strict.check(), RedisProfiles(strict).commit(user, b"", change("a"))):
            with pytest.raises(Unavailable, match=said) as caught:
                await refused
            assert caught.value.code == "store_not_durable"
        assert await lenient.check() is (Durability.NONE if options in LOSES else Durability.EVICTS)
        assert await RedisProfiles(lenient).commit(user, b"", change("a"))


async def test_a_server_that_begins_to_evict_while_it_is_used_is_noticed(
    start_server: Callable[..., ValkeyProcess], user: str
) -> None:
    server = start_server(*DURABLE)
    async with connected(server.url) as connection, server.client() as raw:
        await raw.config_set("maxmemory-policy", "allkeys-lru")
        for refused in (connection.check(), RedisProfiles(connection).commit(user, b"", change("a"))):
            with pytest.raises(Unavailable, match="allkeys-lru"):
                await refused
        await raw.config_set("maxmemory-policy", "noeviction")
        await connection.check()
        assert await RedisProfiles(connection).commit(user, b"", change("a"))


@pytest.mark.parametrize(("options", "waits"), [(EVERYSEC, 1), (DURABLE, 0)])
async def test_every_write_waits_for_the_disk_where_the_server_does_not_by_itself(
    start_server: Callable[..., ValkeyProcess], options: tuple[str, ...], waits: int, user: str
) -> None:
    server = start_server(*options)
    async with opened(server.url) as store, server.client() as raw:
        for write in (store.commit(user, b"", change("a")), store.erase(user, LATER_MS, 0)):
            await raw.config_resetstat()
            assert await write
            calls = {name: stats["calls"] for name, stats in (await raw.info("commandstats")).items()}
            assert calls["cmdstat_eval"] == 1
            assert calls.get("cmdstat_waitaof", 0) == waits


async def test_a_dead_server_is_unavailable_and_a_restarted_one_is_used_again(
    start_server: Callable[..., ValkeyProcess], user: str
) -> None:
    server = start_server(*DURABLE)
    async with connected(server.url) as connection:
        store = RedisProfiles(connection)
        await store.commit(user, b"", change("a"))
        server.kill()
        for attempt in (store.load(user), store.read(user), store.erase(user, LATER_MS, 0), connection.check()):
            with pytest.raises(Unavailable) as caught:
                await attempt
            assert caught.value.headers["Retry-After"]
        server.start()
        assert await store.load(user) is not None


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", ""])
def test_what_is_no_redis_url_is_refused(url: str) -> None:
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
