"""What meets a move to another key, before each write of either: an erasure, a write, an export."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from redis.asyncio import Redis

from adapters.errors import FusionError
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable, UserErased
from server.gateway.users.privacy import Exporting
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from server.store.rotation import Rotation
from server.store.tenants.user_key import User
from tests.support.moving import BOTH, CELL, MOVE_WRITES, SECRETS, put
from tests.support.store_parts import BANK, TENANT, Fault, StoreParts
from tests.support.valkeys.cluster import ValkeyCluster

Servers = ValkeyProcess | ValkeyCluster
ERASE_WRITES = 9  # those that change the user, at the new key, the old one and the new one again
Act = Callable[[], Awaitable[object]]


async def interrupted(connection: RedisConnection, act: Act, place: int, meanwhile: Act) -> None:
    """Let something else happen before the n-th write of an act, or after the last."""
    with pytest.MonkeyPatch.context() as patched:
        write, writes, late = connection.write, itertools.count(), [meanwhile]

        async def writing(script: str, names: Sequence[str], *arguments: object) -> object:
            if next(writes) == place:
                await late.pop()()
            return await write(script, names, *arguments)

        patched.setattr(connection, "write", writing)
        await act()
    for missed in late:
        await missed()


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("at", range(MOVE_WRITES + 1))
async def test_who_is_erased_during_a_move_stays_erased(
    begun: Rotation, server: Servers, raw: Redis, someone: User, at: int
) -> None:
    async with StoreParts.opened(server.url) as gateway:
        moving, (new, old) = Rotation(gateway.connection, SECRETS), someone.keys

        async def erase() -> None:
            erasure = await gateway.erase(someone.id, BOTH)
            assert (erasure.erased.items, erasure.erased.adapters) == (3, 1)

        await interrupted(begun._connection, lambda: begun.move(old, new, TENANT), at, erase)
        for key in (new, old):
            assert {name async for name in raw.scan_iter(f"*{key}*")} <= {keys.epoch(key).encode()}
        assert await raw.scard(keys.adapted(BANK)) == await raw.scard(keys.people(CELL.week, TENANT)) == 0
        assert (await moving.profiles.find(someone))[1] is None
        assert await gateway.erase(someone.id, BOTH)  # the same answer again
        with pytest.raises(UserErased):  # what was in progress
            await moving.at(someone, lambda user: put(gateway, user, "z", ""))
        assert (await moving.profiles.find(someone))[1] is None
        epoch = await moving.begin_write(someone)  # and may come back
        assert await moving.at(someone, lambda user: put(gateway, user, "z", epoch)) == new
        assert (await moving.profiles.find(someone))[0].key == new
        assert await gateway.profiles.load(old) is None


async def test_user_erased_before_the_exchange_can_return_after_it(
    begun: Rotation, parts: StoreParts, someone: User, old: str
) -> None:
    assert await parts.erase(someone.id, BOTH)
    await begun.end()
    found, profile, _ = await begun.profiles.find(someone)
    assert (found.key, profile) == (old, None)
    epoch = await begun.begin_write(someone)
    assert await begun.at(someone, lambda user: put(parts, user, "z", epoch)) == someone.keys[0]
    assert (await begun.profiles.find(someone))[0].key == someone.keys[0]


async def test_erased_user_returns_once_old_key_tombstone_expires(
    begun: Rotation, parts: StoreParts, someone: User, raw: Redis
) -> None:
    await begun.end()
    new, old = someone.keys
    epoch = await begun.begin_write(someone)
    assert await begun.at(someone, lambda user: put(parts, user, "z", epoch)) == new
    assert await parts.erase(someone.id, BOTH)
    await raw.delete(keys.epoch(old))  # its time is over; that of the key with data is longer
    epoch = await begun.begin_write(someone)
    assert await begun.at(someone, lambda user: put(parts, user, "z", epoch)) == new


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("at", range(ERASE_WRITES + 1))
async def test_who_moves_during_an_erasure_is_erased(
    begun: Rotation, server: Servers, parts: StoreParts, someone: User, at: int
) -> None:
    async with StoreParts.opened(server.url) as gateway:
        (new, old), erase = someone.keys, partial(gateway.erase, someone.id, BOTH)
        await interrupted(gateway.connection, erase, at, lambda: begun.move(old, new, TENANT))
        assert (await parts.profiles.find(someone))[1] is None
        assert not any([await parts.jobs.samples(key) or await parts.feedback.entries(key) for key in (new, old)])
        with pytest.raises(UserErased):
            await begun.at(someone, lambda user: put(parts, user, "z", ""))


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("at", range(MOVE_WRITES + 1))
async def test_a_write_meets_a_move_and_is_not_lost(begun: Rotation, server: Servers, someone: User, at: int) -> None:
    async with StoreParts.opened(server.url) as gateway:
        moving, (new, old) = Rotation(gateway.connection, SECRETS), someone.keys

        async def write() -> None:
            assert await moving.at(someone, lambda user: put(gateway, user, "z", "")) == new

        await interrupted(begun._connection, lambda: begun.move(old, new, TENANT), at, write)
        found = await gateway.profiles.read(new)
        assert set(found.items) == set("abcz")
        assert found.profile.adapter is not None
        assert await gateway.profiles.load(old) is None


@pytest.mark.parametrize("erased", [False, True])
async def test_a_first_write_that_began_before_the_exchange(
    moving: Rotation, parts: StoreParts, someone: User, *, erased: bool
) -> None:
    await moving.check()
    epoch = await moving.begin_write(someone)
    if erased:
        assert await parts.erase(someone.id, BOTH) is None
    await moving.begin()
    write = moving.at(someone, lambda user: put(parts, user, "z", epoch))
    if not erased:
        assert await write == someone.keys[0]
        return
    with pytest.raises(UserErased):
        await write


@pytest.mark.parametrize("at", range(MOVE_WRITES + 1))
async def test_a_first_write_that_began_before_a_move_and_an_erasure(
    begun: Rotation, server: Servers, parts: StoreParts, someone: User, at: int
) -> None:
    new, old = someone.keys
    epoch = await parts.profiles.begin(old)  # by a gateway to which the exchange is not known yet
    async with StoreParts.opened(server.url) as gateway:
        erase = partial(gateway.erase, someone.id, BOTH)
        await interrupted(begun._connection, lambda: begun.move(old, new, TENANT), at, erase)
    with pytest.raises(UserErased):
        await begun.at(someone, lambda user: put(parts, user, "z", epoch))


async def exported(parts: StoreParts, user: User) -> dict[str, Any]:
    parts.rotation = Rotation(parts.connection, SECRETS)
    exporting = Exporting(parts, Path(), Mock(check=Mock(side_effect=FusionError("of another bank"))))
    pieces = await exporting.export(user, lambda job: {"state": job.state.value})
    document: dict[str, Any] = orjson.loads(b"".join(pieces))
    return document


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("at", range(MOVE_WRITES))
async def test_an_export_between_the_steps_of_a_move_is_whole(
    begun: Rotation, parts: StoreParts, someone: User, at: int
) -> None:
    before = await exported(parts, someone)
    assert all(before[kind] for kind in ("items", "samples", "feedback", "tally", "jobs", "adapter"))
    begun._connection.fail(Fault.LOST_ANSWER, at)
    with pytest.raises(Unavailable):
        await begun.move(*someone.keys[::-1], TENANT)
    assert await exported(parts, someone) == before


@pytest.mark.usefixtures("old")
async def test_an_export_meets_a_move_and_is_whole(
    begun: Rotation, parts: StoreParts, someone: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, samples = await exported(parts, someone), parts.jobs.samples

    async def samples_after_a_move(key: str) -> list[bytes]:
        assert await begun.move(*someone.keys[::-1], TENANT)
        return await samples(key)

    monkeypatch.setattr(parts.jobs, "samples", samples_after_a_move)
    assert await exported(parts, someone) == before
