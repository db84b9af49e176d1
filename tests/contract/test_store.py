"""What every store must do, held against the real servers at hand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from adapters.errors import MtaError
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.errors import Unavailable, UserErased
from server.store.durability import Durability
from server.store.profiles import Change, Profile, StoredItem, StoredVector
from server.store.redis.profiles import TOMBSTONE_S, RedisProfiles
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.user_key import UserKeys
from tests.support.store_parts import StoreParts

EVERYSEC = ("--appendonly", "yes", "--appendfsync", "everysec")
DIM = 384
EMBEDDER = "3887c9b9af8fe702"

LATER_MS = 1 << 52
_numbers = itertools.count()


@pytest.fixture
async def store(server: ValkeyProcess) -> AsyncIterator[RedisProfiles]:
    async with opened(server.url) as store:
        yield store


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisProfiles]:
    connection = RedisConnection(url)
    await connection.check()
    yield RedisProfiles(connection)
    await connection.close()


@pytest.fixture
def key() -> str:
    return UserKeys("a secret for tests only", "tests").key(f"user-{next(_numbers)}")


def vector(seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).standard_normal(DIM).astype("f4")
    return (raw / np.linalg.norm(raw)).astype("f2").astype("f4")


def profile(user_id: str = "author-033", items: int = 0, **changes: object) -> Profile:
    return replace(Profile(user_id, items, 1_700_000_000_000, EMBEDDER, vector(0)), **changes)


def change(names: str = "", drop: str = "", **changes: object) -> Change:
    items = {name: StoredItem(order, {"text": f"text of {name}"}) for order, name in enumerate(names)}
    vectors = {name: StoredVector(EMBEDDER, vector(ord(name))) for name in names}
    return Change(profile(items=len(names), **changes), items, vectors, tuple(drop))


async def test_an_unknown_user_has_nothing(store: RedisProfiles, key: str) -> None:
    snapshot = await store.read(key)
    assert await store.load(key) is None
    assert (snapshot.version, snapshot.profile, snapshot.items, snapshot.vectors) == (b"", None, {}, {})
    assert await store.stored_bytes(key) == 0
    assert await store.erase(key, LATER_MS, 0) is None


async def test_what_is_committed_is_read_back(store: RedisProfiles, key: str) -> None:
    written = change("abc", extra={99: b"later evidence"})
    assert await store.commit(key, b"", written)
    snapshot = await store.read(key)
    loaded = await store.load(key)
    assert loaded is not None
    assert snapshot.profile is not None
    assert (loaded.user_id, loaded.items, loaded.extra) == ("author-033", 3, {99: b"later evidence"})
    assert np.array_equal(loaded.embedding, written.profile.embedding)
    assert np.array_equal(snapshot.profile.embedding, written.profile.embedding)
    assert snapshot.items == written.put_items
    assert list(snapshot.items) == list("abc")
    assert all(np.array_equal(snapshot.vectors[name].vector, vector(ord(name))) for name in "abc")


async def test_items_come_back_oldest_first_whatever_their_names(store: RedisProfiles, key: str) -> None:
    await store.commit(key, b"", change("zmaqxb"))
    assert list((await store.read(key)).items) == list("zmaqxb")


async def test_a_change_from_an_old_version_writes_nothing(store: RedisProfiles, key: str) -> None:
    assert await store.commit(key, b"", change("a"))
    version = (await store.read(key)).version
    assert await store.commit(key, version, change("b", drop="a"))
    assert not await store.commit(key, version, change("c"))
    assert not await store.commit(key, b"", change("d"))
    assert list((await store.read(key)).items) == ["b"]


async def test_dropping_an_item_drops_its_vector(store: RedisProfiles, key: str) -> None:
    await store.commit(key, b"", change("ab"))
    version = (await store.read(key)).version
    await store.commit(key, version, Change(profile(items=1), {}, {}, ("a",)))
    snapshot = await store.read(key)
    assert list(snapshot.items) == list(snapshot.vectors) == ["b"]


async def test_of_two_concurrent_changes_exactly_one_is_written(server: ValkeyProcess, key: str) -> None:
    async with opened(server.url) as one, opened(server.url) as other:
        for _ in range(20):
            version = (await one.read(key)).version
            outcomes = await asyncio.gather(*(store.commit(key, version, change("a")) for store in (one, other)))
            assert sorted(outcomes) == [False, True]


async def test_a_snapshot_is_of_one_moment(server: ValkeyProcess, key: str) -> None:
    async with opened(server.url) as writer, opened(server.url) as reader:

        async def write() -> None:
            for names in ("ab", "abcd") * 40:
                version = (await writer.read(key)).version
                await writer.commit(key, version, change(names, drop="" if len(names) == 4 else "cd"))

        writing = asyncio.create_task(write())
        while not writing.done():
            snapshot = await reader.read(key)
            if snapshot.profile:
                assert snapshot.profile.items == len(snapshot.items) == len(snapshot.vectors)
        await writing


async def test_erasing_leaves_a_tombstone_that_outlives_a_return_and_gives_the_same_answer_until_then(
    store: RedisProfiles, server: ValkeyProcess, key: str
) -> None:
    await store.commit(key, b"", change("abc"))
    erasure = await store.erase(key, LATER_MS, 1234)
    assert erasure is not None
    assert (erasure.erased.items, erasure.erased.keys, erasure.rewritten_by_ms) == (3, 3, 1234)
    epoch = await store.epoch(key)
    async with server.client() as raw:
        assert [name async for name in raw.scan_iter(f"*{key}*")] == [f"mta:{{{key}}}:epoch".encode()]
        assert 0 < await raw.ttl(f"mta:{{{key}}}:epoch") <= TOMBSTONE_S
        assert await store.load(key) is None
        assert await store.erase(key, LATER_MS, 5678) == erasure
        epoch = await store.epoch(key)
        assert await store.commit(key, b"", change("a"), epoch)
        assert await store.epoch(key) == epoch
    again = await store.erase(key, LATER_MS, 5678)
    assert again is not None
    assert (again.erased.items, again.rewritten_by_ms) == (1, 5678)


async def test_a_change_that_was_under_way_when_the_user_was_erased_is_refused(store: RedisProfiles, key: str) -> None:
    before = await store.read(key)
    assert await store.commit(key, before.version, change("a"), before.epoch)
    await store.erase(key, LATER_MS, 0)
    with pytest.raises(UserErased):
        await store.commit(key, before.version, change("b"), before.epoch)
    empty = await store.read(key)
    assert (empty.profile, empty.items) == (None, {})
    assert await store.commit(key, empty.version, change("c"), empty.epoch)


async def test_a_user_who_is_not_there_can_be_erased_so_that_a_change_under_way_is_refused(
    store: RedisProfiles, key: str
) -> None:
    before = await store.read(key)
    assert await store.erase(key, LATER_MS, 0) is None
    with pytest.raises(UserErased):
        await store.commit(key, before.version, change("a"), before.epoch)


async def test_an_erasure_that_comes_too_late_does_nothing(store: RedisProfiles, key: str) -> None:
    await store.commit(key, b"", change("a"))
    with pytest.raises(Unavailable, match="too long"):
        await store.erase(key, 1, 0)
    assert await store.load(key) is not None
    assert await store.epoch(key) == ""


async def test_the_user_id_stands_in_the_record_alone(store: RedisProfiles, server: ValkeyProcess, key: str) -> None:
    await store.commit(key, b"", change("abc", user_id="someone-unmistakable"))
    async with server.client() as raw:
        holding = [name async for name in raw.scan_iter(f"mta:*{key}*") if b"unmistakable" in await raw.dump(name)]
        assert holding == [f"mta:{{{key}}}:profile".encode()]


async def test_a_user_without_items_takes_less_than_a_kibibyte(store: RedisProfiles, key: str) -> None:
    await store.commit(key, b"", change(user_id="u" * 36))
    assert 0 < await store.stored_bytes(key) < 1024


async def test_a_record_that_cannot_be_read_is_reported(store: RedisProfiles, server: ValkeyProcess, key: str) -> None:
    async with server.client() as raw:
        await raw.set(f"mta:{{{key}}}:profile", b"\x07garbage")
    with pytest.raises(Unavailable, match="cannot read"):
        await store.load(key)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DURABLE, Durability.ALWAYS),
        (EVERYSEC, Durability.WAITAOF),
        ((*DURABLE, "--rename-command", "CONFIG", ""), Durability.WAITAOF),
    ],
)
async def test_a_server_that_keeps_what_it_acknowledges_is_taken(
    start_server: Callable[..., ValkeyProcess], options: tuple[str, ...], expected: Durability, key: str
) -> None:
    connection = RedisConnection(start_server(*options).url)
    assert await connection.check() is expected
    store = RedisProfiles(connection)
    assert await store.commit(key, b"", change("a"))
    assert (await store.erase(key, LATER_MS, 0)) is not None
    await connection.close()


@pytest.mark.parametrize(
    "options",
    [
        ("--appendonly", "no"),
        ("--appendonly", "yes", "--appendfsync", "no"),
        ("--appendonly", "no", "--rename-command", "CONFIG", ""),
    ],
)
async def test_a_server_that_does_not_is_refused_or_on_request_only_noted(
    start_server: Callable[..., ValkeyProcess], options: tuple[str, ...], key: str
) -> None:
    url = start_server(*options).url
    strict, lenient = RedisConnection(url), RedisConnection(url, require_durable=False)
    with pytest.raises(Unavailable, match="appendonly yes"):
        await strict.check()
    with pytest.raises(Unavailable, match="appendonly yes"):
        await RedisProfiles(strict).commit(key, b"", change("a"))
    assert await lenient.check() is Durability.NONE
    assert await RedisProfiles(lenient).commit(key, b"", change("a"))
    await strict.close()
    await lenient.close()


@pytest.mark.parametrize(("options", "waits"), [(EVERYSEC, 1), (DURABLE, 0)])
async def test_every_write_waits_for_the_disk_where_the_server_does_not_by_itself(
    start_server: Callable[..., ValkeyProcess], options: tuple[str, ...], waits: int, key: str
) -> None:
    server = start_server(*options)
    async with opened(server.url) as store, server.client() as raw:
        for write in (store.commit(key, b"", change("a")), store.erase(key, LATER_MS, 0)):
            await raw.config_resetstat()
            assert await write
            calls = {name: stats["calls"] for name, stats in (await raw.info("commandstats")).items()}
            assert calls["cmdstat_eval"] == 1
            assert calls.get("cmdstat_waitaof", 0) == waits


async def test_a_dead_server_is_unavailable_and_a_restarted_one_is_used_again(
    start_server: Callable[..., ValkeyProcess], key: str
) -> None:
    server = start_server(*DURABLE)
    connection = RedisConnection(server.url)
    await connection.check()
    store = RedisProfiles(connection)
    await store.commit(key, b"", change("a"))
    server.kill()
    for attempt in (store.load(key), store.read(key), store.erase(key, LATER_MS, 0), connection.check()):
        with pytest.raises(Unavailable) as caught:
            await attempt
        assert caught.value.headers["Retry-After"]
    server.start()
    assert await store.load(key) is not None
    await connection.close()


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", ""])
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(MtaError, match="MTA_REDIS_URL"):
        RedisConnection(url)


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
