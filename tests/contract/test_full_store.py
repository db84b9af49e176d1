"""A store at its `maxmemory`, filled by writes: it says so, takes nothing more, and lets whoever is in it go."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import redis.asyncio as redis

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.queue import UserQueue
from server.store.redis import keys
from server.store.tenants.access_keys import AccessKeys, Scope, access_key, new_secret
from server.store.tenants.rates import Rate, Rates, Use
from tests.support.store_parts import BANK, KEYS, StoreParts, WorkerSteps, submitted
from tests.support.stored import on_disk, until_forgotten

ROOM_BYTES = 1_200_000  # far more than what connections and scripts take of it meanwhile
ANN, BOB, CAI = "ann", "bob", "cai"
SAMPLE = "a sample of ann's"

Nodes = Sequence[ValkeyProcess]


@pytest.fixture
def nodes(server: ValkeyProcess | ValkeyCluster) -> Nodes:
    """The servers that take writes."""
    return [server] if isinstance(server, ValkeyProcess) else server.primaries


@pytest.fixture
async def keyring(parts: StoreParts) -> AccessKeys:
    """API keys, of which one, made while there was room, has leaked."""
    keyring = AccessKeys(parts.connection)
    await keyring.add(access_key(new_secret(), "leaked", "acme", (Scope.GENERATE,)))
    return keyring


@pytest.fixture
async def full(
    server: ValkeyProcess | ValkeyCluster, nodes: Nodes, parts: StoreParts, keyring: AccessKeys
) -> AsyncIterator[StoreParts]:
    """Stores on servers without room. Ann has a profile, a user adapter, samples, a job and a call in them; a job of
    Cai's was announced and never stored."""
    await parts.put(ANN, "about ann")
    worker, key = WorkerSteps(parts), KEYS.key(ANN)
    await submitted(parts.jobs, key, SAMPLE)
    await worker.take()
    await worker.claim()
    assert await worker.promote()
    await submitted(parts.jobs, key, SAMPLE, "another")
    await parts.signing.add(key)
    await parts.put(CAI, "about cai")
    await UserQueue(parts.connection, "jobs", BANK).reserve(KEYS.key(CAI))
    for node in nodes:
        ask(node, "CONFIG SET", "maxmemory", ask(node, "INFO", "memory")["used_memory"] + ROOM_BYTES)
        await _fill(parts, lambda user, node=node: node is _home(server, user))
    for node in nodes:  # what is let go now and then makes no room
        ask(node, "CONFIG SET", "maxmemory", ask(node, "INFO", "memory")["maxmemory"] - ROOM_BYTES // 2)
    yield parts
    for node in nodes:
        ask(node, "CONFIG SET", "maxmemory", 0)


def _home(server: ValkeyProcess | ValkeyCluster, user: str) -> ValkeyProcess:
    return server if isinstance(server, ValkeyProcess) else server.home_of(keys.profile(KEYS.key(user)))


async def _fill(parts: StoreParts, chosen: Callable[[str], bool]) -> None:
    for user in filter(chosen, (f"one of many {number}" for number in itertools.count())):
        try:
            await parts.put(user, "x" * 50_000)
        except Unavailable as error:
            assert error.code == "store_full"
            return


async def test_it_refuses_what_would_be_stored_and_serves_who_is_in_it(full: StoreParts, keyring: AccessKeys) -> None:
    for refused in (
        full.put(BOB, "about bob"),
        submitted(full.jobs, KEYS.key(BOB)),
        full.signing.add(KEYS.key(BOB)),
        full.connection.run(lambda redis: redis.set("mta:{bob}:samples", "x")),
    ):
        with pytest.raises(Unavailable, match="full") as caught:
            await refused
        assert (caught.value.status, caught.value.code) == (503, "store_full")
    assert (await full.connection.check()).is_durable
    memory = full.connection.memory
    assert memory.full
    assert memory.used_bytes > memory.max_bytes > 0
    assert await full.profiles.load(KEYS.key(ANN)) is not None

    # A key is revoked, and another takes its place.
    [leaked] = (await keyring.all()).keys
    assert await keyring.revoke(leaked.digest, 7)
    assert not await keyring.revoke(leaked.digest, 8)
    another = access_key(new_secret(), "another", "acme", (Scope.GENERATE,))
    assert await keyring.add(another)
    revoked = {key.digest: key.revoked_ms for key in (await keyring.all()).keys}
    assert revoked == {leaked.digest: 7, another.digest: None}

    # Limits hold for whoever filled it.
    rates, use = Rates(full.connection), Use(Rate("requests", "key-1", 1), 1)
    assert (await rates.consume([use])).counted
    assert not (await rates.consume([use])).counted
    assert await rates.acquire("running/key-1", ["one"], 60, 1) == 1
    assert await rates.acquire("running/key-1", ["two"], 60, 1) is None
    await rates.renew("running/key-1", ["one"], 60)


async def test_users_are_erased_from_it_and_its_file_forgets_them(
    quick_rewrites: None, full: StoreParts, raw: redis.Redis, nodes: Nodes
) -> None:
    key = KEYS.key(ANN)
    assert on_disk(SAMPLE, *nodes)
    erasure = await full.erase(ANN)
    erased = erasure.erased
    assert (erased.items, erased.samples, erased.jobs, erased.adapters) == (1, 2, 2, 1)
    assert [name async for name in raw.scan_iter(f"*{key}*")] == [keys.epoch(key).encode()]
    assert await full.erase(ANN) == erasure
    assert await full.erase(CAI)
    assert not await raw.sismember(keys.adapted(BANK), key)
    for name in (*keys.queue("jobs", BANK), *keys.queue("sign", BANK)):
        assert await raw.type(name) in (b"none", b"zset")
        assert await raw.zscore(name, key) is None
    with pytest.raises(Unavailable, match="full"):
        await full.put(BOB, "about bob")
    await until_forgotten(full.connection, SAMPLE, *nodes)


async def test_there_is_room_again_once_enough_was_erased(full: StoreParts, nodes: Nodes, raw: redis.Redis) -> None:
    erased = 0
    for number in itertools.count():
        if erased and not any(_full(node) for node in nodes):
            break
        erased += await full.erase(f"one of many {number}") is not None
    await full.put(BOB, "about bob")


def _full(node: ValkeyProcess) -> bool:
    memory = ask(node, "INFO", "memory")
    return bool(memory["used_memory"] > memory["maxmemory"])
