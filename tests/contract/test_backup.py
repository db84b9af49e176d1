"""What is copied of a store comes back as it was, on every kind of server; what makes a copy incomplete is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from adapters.errors import MtaError
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.settings import Settings
from server.store.backup import copying
from server.store.backup.copying import Entry, StoreCopying
from server.store.backup.restoring import Restore, Since
from server.store.opening import open_stores
from server.store.profile_record import AdapterNote
from server.store.profiles import Change
from server.store.redis import keys
from server.store.rotation import Rotation
from server.store.tenants.access_keys import Scope, access_key, new_secret
from server.store.tenants.rates import Rate, Use
from tests.support.store_parts import (
    BANK,
    KEYS,
    SECRET,
    StoreParts,
    WorkerSteps,
    change,
    connected,
    stored,
    submitted,
    users_at,
)
from tests.support.valkeys.cluster import ValkeyCluster

USERS = [f"user-{n}" for n in range(40)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SETTLE_S", 0)


@pytest.fixture
async def full(parts: StoreParts) -> AsyncIterator[StoreParts]:
    for user in USERS:
        key = KEYS.key(user)
        await stored(parts.profiles, key, change("abc", user_id=user))
        await submitted(parts.jobs, key, "\x00\xff binary")
        await parts.to_sign.add(key)
    await parts.erase(USERS[0])
    await parts.keys.add(access_key(new_secret(), "app", "acme", Scope))
    await parts.keys.note_used(["a digest"], 1)
    assert (await parts.rates.consume([Use(Rate("tokens", "user-x", 5), 1)]))[0].fits
    assert await parts.rates.acquire("gateways/0", ["it"], 60)
    yield parts


async def copied(store: StoreCopying) -> list[Entry]:
    return [entry async for entry in store.entries(lambda done, total: None)]


async def written(store: StoreCopying, entries: list[Entry], copy: str = "a copy") -> None:
    await store.begin_restore(copy)
    assert [n async for n in store.write(entries)][-1] == len(entries)
    await store.end_restore()


async def contents(raw: Redis) -> dict[str, tuple[Any, int]]:
    """What each key holds, and when it expires."""
    found = {}
    for name in [name.decode() async for name in raw.scan_iter()]:
        reads = {b"hash": raw.hgetall, b"set": raw.smembers}  # their order may change
        found[name] = (await reads.get(await raw.type(name), raw.dump)(name), await raw.pexpiretime(name))
    return found


async def test_restore_returns_every_key_except_limits_and_rewrites(full: StoreParts, raw: Redis) -> None:
    before = await contents(raw)
    store = StoreCopying(full.connection)
    entries = await copied(store)
    of_users = [entry for entry in entries if keys.user_of(entry[0][0])]
    assert len(of_users) == len({keys.user_of(entry[0][0]) for entry in of_users}) == len(USERS)
    assert entries[: len(USERS)] == of_users, "queues lead to users, who are there before them"
    assert store.version.split()[0] in ("valkey", "redis")
    await store.note_copy(1e9 + 0.25)
    assert await store.copied_s() == 1e9 + 0.25
    await raw.flushall()
    await written(store, entries)
    after = await contents(raw)
    left_out = before.keys() - after.keys()
    assert {name.split(":")[1] for name in left_out} == {"rates", "held", "{rewrite}"}
    assert after == {name: before[name] for name in after}
    assert after[keys.epoch(KEYS.key(USERS[0]))][1] > 0


async def test_each_user_is_copied_as_of_one_moment(full: StoreParts) -> None:
    key, enough = KEYS.key(USERS[1]), False

    async def write() -> None:
        while not enough:
            for names, drop in (("ab", "c"), ("abc", "")):
                version = (await full.profiles.read(key)).version
                await full.profiles.commit(key, version, change(names, drop=drop))

    writing = asyncio.create_task(write())
    store = StoreCopying(full.connection)
    found = []
    for _ in range(50):
        entry = await store._dump_user(key)
        found.append(entry)
    enough = True
    await writing
    await full.connection.run(lambda redis: redis.delete(*keys.of_user(key)))
    for entry in found:
        await store._restore(entry)
        snapshot = await full.profiles.read(key)
        assert snapshot.profile.items == len(snapshot.items) == len(snapshot.vectors)


async def test_who_is_younger_than_the_copied_queues_is_put_into_them(
    parts: StoreParts, raw: Redis, server: ValkeyProcess | ValkeyCluster
) -> None:
    key, worker = KEYS.key("ada"), WorkerSteps(parts)
    await parts.put("ada", "a text")
    await submitted(parts.jobs, key)
    await worker.take()
    await worker.claim()
    adapter = await worker.promote()
    await parts.to_sign.add(key)
    await worker.take_signing()
    await worker.sign()
    await parts.put("ada", "another text, so the signature is old")
    await submitted(parts.jobs, key, "another sample")
    for name in [name async for name in raw.scan_iter() if not keys.user_of(name.decode())]:
        await raw.delete(name)
    async with open_stores(Settings(redis_url=server.url)) as stores:
        assert await Restore(Path(), Mock(), Since(), ()).settle(stores, key)
        assert [user async for user in stores.adapters.adapted_users(BANK)] == [key]
        assert await stores.adapters.adapter_id(key) == adapter
        assert (await stores.jobs.next_job(BANK, 1)).user_key == key
        assert await stores.signing(BANK).take(1) == key


async def test_a_user_with_an_adapter_of_a_former_format_is_restored(
    parts: StoreParts, server: ValkeyProcess | ValkeyCluster
) -> None:
    key, note = KEYS.key("ada"), AdapterNote("a" * 26, f"mta2:{BANK}:shared:c", 1, 1)
    await parts.put("ada", "a text")
    snapshot = await parts.profiles.read(key)
    adapted = Change(replace(snapshot.profile, adapter=note), {}, {}, ())
    assert await parts.profiles.commit(key, snapshot.version, adapted)
    async with open_stores(Settings(redis_url=server.url)) as stores:
        assert await Restore(Path(), Mock(), Since(), ()).settle(stores, key)
        assert [user async for user in stores.adapters.adapted_users(BANK)] == [key]


async def test_unfinished_restore_refuses_access_until_repeated(
    full: StoreParts, raw: Redis, server: ValkeyProcess | ValkeyCluster
) -> None:
    entries = await copied(StoreCopying(full.connection))
    async with connected(server.url, require_durable=False) as connection:
        store = StoreCopying(connection)
        with pytest.raises(MtaError, match=r"not empty, it holds mta:.*FLUSHALL"):
            await store.begin_restore("a copy")
        await full.connection.check()  # it was never marked
        await raw.flushall()
        await full.keys.note_used(["a digest"], 1)  # as a gateway does that runs meanwhile
        await Rotation(full.connection, SECRET).check()
        await store.begin_restore("a copy")
        await store._restore(entries[0])
    with pytest.raises(Unavailable, match="run `mta restore` again"):
        await full.connection.check()
    with pytest.raises(Unavailable, match="incomplete"):
        await full.keys.set_bank("acme", "")
    with pytest.raises(MtaError, match="half restored"):
        await copied(StoreCopying(full.connection))
    async with connected(server.url, require_durable=False) as connection:
        store = StoreCopying(connection)
        with pytest.raises(MtaError, match=r"another copy \(a copy\)"):
            await store.begin_restore("another copy")
        await written(store, entries)
    await full.connection.check()
    await full.keys.set_bank("acme", "")


async def test_restore_keeps_profile_written_while_it_begins(
    parts: StoreParts, server: ValkeyProcess | ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(server.url, require_durable=False) as connection:
        settling = SimpleNamespace(sleep=lambda seconds: parts.put("ada", "a text"), gather=asyncio.gather)
        monkeypatch.setattr(copying, "asyncio", settling)  # its own alone: gateways run in this process, too
        with pytest.raises(MtaError, match="not empty"):
            await StoreCopying(connection).begin_restore("a copy")
    await parts.connection.check()
    assert await parts.profiles.load(KEYS.key("ada"))


async def test_a_refused_content_is_named(parts: StoreParts) -> None:
    broken = [(keys.profile("a" * 26), 0, b"no dump")]
    with pytest.raises(MtaError, match=r"does not take mta:\{a+\}:profile: .*DUMP payload.*Is its server older"):
        await written(StoreCopying(parts.connection), [broken])


async def test_keys_that_move_meanwhile_are_noticed(cluster: ValkeyCluster) -> None:
    async with cluster.client() as raw:
        await raw.flushall()
    async with StoreParts.opened(cluster.url) as parts:
        here, there, _ = cluster.primaries
        key = next(users_at(cluster, here))
        await stored(parts.profiles, key, change("a"))
        slot = key_slot(keys.profile(key).encode())
        store = StoreCopying(parts.connection)
        entries = store.entries(lambda done, total: None)
        assert (await anext(entries))[0][0] == keys.profile(key)
        cluster.move(slot, here, there)
        try:
            with pytest.raises(MtaError, match="make the copy again"):
                await anext(entries)
        finally:
            cluster.move(slot, there, here)
        assert len(await copied(store)) == 1


async def test_a_server_that_restarts_meanwhile_is_noticed(one_server: ValkeyProcess) -> None:
    async with one_server.client() as raw:
        await raw.flushall()
    async with StoreParts.opened(one_server.url) as parts:
        await stored(parts.profiles, KEYS.key("ada"), change("a"))
        entries = StoreCopying(parts.connection).entries(lambda done, total: None)
        await anext(entries)
        one_server.kill()
        one_server.start()
        with pytest.raises(MtaError, match="replaced or restarted"):
            [entry async for entry in entries]
