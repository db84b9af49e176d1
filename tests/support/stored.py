"""People made up to be stored, a store to put them into, and what a store holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import redis

from server.store.profiles import Change, Profile, StoredItem, StoredVector
from server.store.redis.profiles import RedisProfiles
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import EMBEDDER

DIM = 384
LATER_MS = 1 << 52


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisProfiles]:
    connection = RedisConnection(url)
    await connection.check()
    yield RedisProfiles(connection)
    await connection.close()


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
