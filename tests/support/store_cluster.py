"""What tests of the stores over a cluster share."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import numpy as np

from bench.rig.cluster import ValkeyCluster
from bench.rig.valkey import ValkeyProcess
from server.store.profiles import Change, Profile, StoredItem
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from tests.support.store_parts import EMBEDDER, KEYS

LATER_MS = 1 << 52
_numbers = itertools.count()


@asynccontextmanager
async def opened(cluster: ValkeyCluster) -> AsyncIterator[RedisConnection]:
    """A process's connection to it, checked."""
    connection = RedisConnection(cluster.url)
    await connection.check()
    yield connection
    await connection.close()


def users_at(cluster: ValkeyCluster, home: ValkeyProcess) -> Iterator[str]:
    """Keys of users whom no other test knows, and whom one of the primaries holds."""
    for number in _numbers:
        key = KEYS.key(f"user-of-a-cluster-{number}")
        if cluster.home_of(keys.profile(key)) is home:
            yield key


def change(text: str) -> Change:
    """A change to a profile of one item; each is another record."""
    profile = Profile("somebody", 1, 1, EMBEDDER, np.ones(4, "f4") / 2)
    return Change(profile, {"it": StoredItem(0, {"text": text})}, {}, ())
