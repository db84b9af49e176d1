"""People made up to be stored, a store to put them into, and what a store holds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import redis

from bench.rig.cluster import ValkeyCluster
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.profile_record import Profile, StoredItem, StoredVector
from server.store.profiles import Change, ProfileStore
from server.store.redis import keys
from server.store.redis.servers.append_only_file import AppendOnlyFile
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import EMBEDDER, KEYS

DIM = 384
LATER_MS = 1 << 52
_numbers = itertools.count()


@asynccontextmanager
async def connected(url: str, **options: bool) -> AsyncIterator[RedisConnection]:
    """A process's connection, checked where nothing else is asked for."""
    connection = RedisConnection(url, **options)
    try:
        if not options:
            await connection.check()
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[ProfileStore]:
    async with connected(url) as connection:
        yield ProfileStore(connection)


@asynccontextmanager
async def strict_and_lenient(url: str) -> AsyncIterator[tuple[RedisConnection, RedisConnection]]:
    """Unchecked: one that refuses what is not durable, and one that does not."""
    async with (
        connected(url, require_durable=True) as strict,
        connected(url, require_durable=False) as lenient,
    ):
        yield strict, lenient


def users_at(cluster: ValkeyCluster, home: ValkeyProcess) -> Iterator[str]:
    """Keys of users whom no other test knows, and whom one of the primaries holds."""
    for number in _numbers:
        key = KEYS.key(f"user-of-a-cluster-{number}")
        if cluster.home_of(keys.profile(key)) is home:
            yield key


def on_disk(text: str, *servers: ValkeyProcess) -> bool:
    """Whether a text stands in any of their files."""
    files = (path for server in servers for path in server.folder.rglob("*") if path.is_file())
    return any(text.encode() in path.read_bytes() for path in files)


async def forgotten(connection: RedisConnection, key: str, *servers: ValkeyProcess) -> None:
    """What is stored of a user and erased stands in the files of its servers, and then leaves them."""
    store, file, secret = ProfileStore(connection), AppendOnlyFile(connection), "words that nobody shall find again"
    await store.commit(key, b"", change("a", user_id=secret))
    asked = await file.request_rewrite(key)
    assert await store.erase(key, asked.erase_by_ms, asked.rewritten_by_ms)
    assert all(on_disk(secret, server) for server in servers)
    await until_forgotten(connection, secret, *servers)


async def until_forgotten(connection: RedisConnection, text: str, *servers: ValkeyProcess) -> None:
    """Look after the append-only files, as a gateway does, until the text is gone from them."""
    file = AppendOnlyFile(connection)
    async with asyncio.timeout(60):
        while on_disk(text, *servers):
            await file.rewrite_if_due()
            await asyncio.sleep(0.05)


class Writing:
    """Users whose record is written all the while, each time with a higher `updated_ms`."""

    def __init__(self, store: ProfileStore, users: Sequence[str]) -> None:
        self._store, self._enough = store, False
        self._tried, self._written, self._refused = dict.fromkeys(users, 0), dict.fromkeys(users, 0), set[str]()

    async def __aenter__(self) -> Writing:
        self._running = [asyncio.create_task(self._write(user)) for user in self._tried]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._enough = True
        await asyncio.gather(*self._running)  # to their ends: what comes during a read need not be in its answer

    async def goes_on(self) -> None:
        """Wait until everybody has been written ten times more."""
        before = dict(self._written)
        while not all(self._written[user] > before[user] + 10 for user in before):
            assert not any(task.done() for task in self._running), self._running
            await asyncio.sleep(0.02)

    async def check(self) -> None:
        """What was acknowledged is there, and what was not was refused."""
        for user, written in self._written.items():
            found = await self._store.load(user)
            assert written <= found.updated_ms <= self._tried[user]
        assert self._refused <= {"store_unavailable", "store_not_durable"}

    async def _write(self, user: str) -> None:
        while not self._enough:
            self._tried[user] = number = self._tried[user] + 1
            try:
                snapshot = await self._store.read(user)
                assert await self._store.commit(user, snapshot.version, change("a", updated_ms=number), snapshot.epoch)
            except Unavailable as error:
                self._refused.add(error.code)
                await asyncio.sleep(0.05)
            else:
                self._written[user] = number


def vector(seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).standard_normal(DIM).astype("f4")
    return (raw / np.linalg.norm(raw)).astype("f2").astype("f4")


def profile(user_id: str = "author-033", items: int = 0, **changes: object) -> Profile:
    return replace(Profile(user_id, items, 1_700_000_000_000, EMBEDDER, vector(0)), **changes)


def change(names: str = "", drop: str = "", **changes: object) -> Change:
    items = {name: StoredItem(order, {"text": f"text of {name}"}) for order, name in enumerate(names)}
    vectors = {name: StoredVector(EMBEDDER, vector(ord(name))) for name in names}
    return Change(profile(items=len(names), **changes), items, vectors, tuple(drop))


def held_by(url: str) -> dict[str, str]:
    """A digest of what each key holds, so that two of them are equal if nothing was changed, and short if they are not.

    Left out are the gateways' own signs of life, which change every two seconds whatever a request does.
    """
    with redis.from_url(url) as store:
        names = sorted(name.decode() for name in store.scan_iter() if not name.startswith(b"mta:held:gateways/"))
        return {name: blake2b(store.dump(name) or b"", digest_size=8).hexdigest() for name in names}
