"""What must hold while users move from the key by one secret to the key by another; on a cluster the two are apart."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from redis.asyncio import Redis

from adapters.errors import FusionError, MtaError
from bench.rig.cluster import ValkeyCluster
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable, UserErased
from server.gateway.users.privacy import Exporting
from server.store import rotation
from server.store.backup.copying import StoreCopying
from server.store.feedback import Feedback
from server.store.jobs import JobState
from server.store.profiles import TOMBSTONE_S
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from server.store.rotation import Rotation
from server.store.samples import Sample, encode_sample
from server.store.tenants.user_key import User, UserKeys
from server.store.worth import Cell, Counts
from tests.support.store_parts import (
    BANK,
    KEYS,
    SECRET,
    TENANT,
    Fault,
    StoreParts,
    WorkerSteps,
    change,
    claimed,
    submitted,
)

Servers = ValkeyProcess | ValkeyCluster

SECRETS = f"the secret that comes after it,{SECRET}"
BOTH = UserKeys(SECRETS, TENANT)
CELL = Cell(2961, 0, "merged", "full")
WORDS = "words of a person"
ERASE_WRITES = 9  # those that change the user, at the new key, the old one and the new one again
MOVE_WRITES = 5  # leave, arrive, add to the bank's set (two), clear


@pytest.fixture
def moving(parts: StoreParts) -> Rotation:
    return Rotation(parts.connection, SECRETS)


@pytest.fixture
async def begun(moving: Rotation) -> Rotation:
    await moving.check()
    assert await moving.begin()
    return moving


@pytest.fixture
def someone(server: Servers) -> User:
    """A user whose two keys are on two servers, if there are several."""
    for number in range(1000):
        user = BOTH.user(f"someone-{number}")
        homes = [server.home_of(keys.profile(key)) if isinstance(server, ValkeyCluster) else key for key in user.keys]
        if homes[0] != homes[1]:
            return user
    raise AssertionError


@pytest.fixture
async def old(parts: StoreParts, someone: User) -> str:
    """The old key of a user of whom everything is stored that can be."""
    key = someone.keys[1]
    assert await parts.profiles.commit(key, b"", change("abc", user_id=someone.id))
    await submitted(parts.jobs, key, encode_sample(Sample([], WORDS)).decode())
    worker = WorkerSteps(parts)
    await worker.take()
    await worker.claim()
    assert await worker.promote()
    await parts.feedback.add(key, "gen-1", Feedback("base", "none"), Sample([], WORDS), "")
    assert await parts.worth.add(key, "", {CELL: Counts(answers=1)})
    await parts.holdings.note(TENANT, {key: (await parts.profiles.measure(key))[1]})
    await parts.worth.add_people(CELL.week, TENANT, [key])
    return key


async def place_of(user: User) -> User:
    return user


async def put(parts: StoreParts, user: User, name: str, epoch: str) -> str:
    """Add an item at the user's key, and return the key."""
    snapshot = await parts.profiles.read(user.key)
    before = snapshot.profile
    added = change(name, user_id=user.id, adapter=before and before.adapter)
    assert await parts.profiles.commit(user.key, snapshot.version, added, epoch)
    return user.key


async def held(raw: Redis, key: str) -> dict[str, object]:
    """What is stored under a user key for good, by kind."""
    read = {b"string": raw.get, b"hash": raw.hgetall, b"list": lambda name: raw.lrange(name, 0, -1)}
    prefix = f"mta:{{{key}}}:"
    names = [name.decode() async for name in raw.scan_iter(f"{prefix}*")]
    lasting = [name for name in names if await raw.ttl(name) == -1 or "tally" in name]
    return {name.removeprefix(prefix): await read[await raw.type(name)](name) for name in lasting}


async def test_a_user_moves_with_all_that_is_stored(
    begun: Rotation, parts: StoreParts, raw: Redis, someone: User, old: str
) -> None:
    new = someone.keys[0]
    before = await held(raw, old)
    assert {kind.partition(":")[0] for kind in before} == {
        name.rpartition(":")[2] for name in keys.of_user(old)[:-1]
    } | {"job"}
    job = (await parts.jobs.jobs(old))[-1]
    tombstone = {b"epoch": b"of an earlier life", b"rewritten_by": b"1234"}
    await raw.hset(keys.epoch(old), mapping=tombstone)
    await raw.expire(keys.epoch(old), TOMBSTONE_S)
    assert await begun.move(old, new, TENANT)
    assert await held(raw, new) == before
    assert await held(raw, old) == {}
    assert await raw.hgetall(keys.epoch(new)) == tombstone
    assert TOMBSTONE_S - 60 < await raw.ttl(keys.epoch(new)) <= TOMBSTONE_S
    assert replace((await parts.jobs.jobs(new))[-1], id=job.id) == job
    assert await parts.profiles.moved_to(old) == new
    counted = await raw.hgetall(keys.count(TENANT))
    assert (counted[b"people"], counted[b"adapters"], new.encode() in counted, old.encode() in counted) == (
        *(b"1", b"1"),
        True,
        False,
    )
    assert (
        await raw.smembers(keys.adapted(BANK)) == await raw.smembers(keys.people(CELL.week, TENANT)) == {new.encode()}
    )
    left = {name: await raw.pttl(name) for name in [keys.items(old), keys.adapter(old)]}  # for requests in progress
    assert all(0 < ms <= rotation.GRACE_MS for ms in left.values()), left
    assert 0 < await raw.ttl(keys.epoch(old)) <= rotation.MARK_S
    again = await held(raw, new)
    assert await begun.move(old, new, TENANT)
    assert await held(raw, new) == again


async def test_who_moved_is_found_whatever_the_order_of_secrets_and_refuses_every_write_at_the_old_key(
    begun: Rotation, parts: StoreParts, raw: Redis, someone: User, old: str
) -> None:
    other_order = replace(someone, key=old, keys=someone.keys[::-1])
    for user in (someone, other_order):
        assert (await parts.profiles.find(user))[0].key == old
    epochs = {"", (await parts.profiles.read(old)).epoch}
    assert await begun.move(old, someone.keys[0], TENANT)
    for user in (someone, other_order):
        found, profile, _ = await parts.profiles.find(user)
        assert (found.key, profile.user_id) == (someone.keys[0], someone.id)
    kept = await held(raw, someone.keys[0])
    marked = (await raw.hget(keys.epoch(old), "epoch")).decode()
    for epoch in {*epochs, await parts.profiles.epoch(old), marked}:
        with pytest.raises(UserErased):
            await parts.profiles.commit(old, b"", change("z"), epoch)
        with pytest.raises(UserErased):
            await submitted(parts.jobs, old, epoch=epoch)
        with pytest.raises(UserErased):
            await parts.feedback.add(old, "gen-2", Feedback("base", "none"), None, epoch)
        assert not await parts.worth.add(old, epoch, {CELL: Counts(answers=1)})
    assert await held(raw, someone.keys[0]) == kept
    assert await held(raw, old) == {}


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("at", range(MOVE_WRITES))
@pytest.mark.usefixtures("old")
async def test_a_move_may_stop_anywhere_and_goes_on(
    begun: Rotation, raw: Redis, someone: User, fault: Fault, at: int
) -> None:
    old, connection = someone.keys[1], begun._connection
    before = await held(raw, old)
    connection.fail(fault, at)
    try:
        assert await begun.move(old, someone.keys[0], TENANT)
    except Unavailable:
        assert fault is not Fault.TWICE
    connection.fail(None)
    _, profile, _ = await begun.profiles.find(someone)
    assert profile.user_id == someone.id  # nobody is unknown meanwhile
    assert (await begun.at(someone, place_of)).key == someone.keys[0]  # whoever writes finishes it
    assert await begun.move(old, someone.keys[0], TENANT)
    assert await held(raw, someone.keys[0]) == before
    assert await held(raw, old) == {}
    for shared in (keys.adapted(BANK), keys.people(CELL.week, TENANT)):
        assert await raw.smembers(shared) == {someone.keys[0].encode()}


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
            assert [name async for name in raw.scan_iter(f"*{key}*")] == [keys.epoch(key).encode()]
        assert await raw.scard(keys.adapted(BANK)) == await raw.scard(keys.people(CELL.week, TENANT)) == 0
        assert (await moving.profiles.find(someone))[1] is None
        assert await gateway.erase(someone.id, BOTH)  # the same answer again
        with pytest.raises(UserErased):  # what was in progress
            await moving.at(someone, lambda user: put(gateway, user, "z", ""))
        assert (await moving.profiles.find(someone))[1] is None
        epoch = (await moving.profiles.find(someone))[2]  # and may come back
        assert await moving.at(someone, lambda user: put(gateway, user, "z", epoch)) == new
        assert (await moving.profiles.find(someone))[0].key == new
        assert await gateway.profiles.load(old) is None


async def test_who_was_erased_before_the_exchange_may_come_back_after_it(
    begun: Rotation, parts: StoreParts, someone: User, old: str
) -> None:
    assert await parts.erase(someone.id, BOTH)
    await begun.end()
    found, profile, epoch = await begun.profiles.find(someone)
    assert (found.key, profile) == (old, None)
    assert await begun.at(someone, lambda user: put(parts, user, "z", epoch)) == someone.keys[0]
    assert (await begun.profiles.find(someone))[0].key == someone.keys[0]


async def test_who_came_after_the_exchange_and_was_erased_may_come_back_once_the_old_keys_tombstone_is_over(
    begun: Rotation, parts: StoreParts, someone: User, raw: Redis
) -> None:
    await begun.end()
    new, old = someone.keys
    assert await begun.at(someone, lambda user: put(parts, user, "z", "")) == new
    assert await parts.erase(someone.id, BOTH)
    await raw.delete(keys.epoch(old))  # its time is over; that of the key with data is longer
    epoch = (await begun.profiles.find(someone))[2]
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


async def exported(parts: StoreParts, user: User) -> dict[str, Any]:
    exporting = Exporting(
        Rotation(parts.connection, SECRETS),
        jobs=parts.jobs,
        feedback=parts.feedback,
        worth=parts.worth,
        adapters=parts.adapters,
        folder=Path(),
        manifest=Mock(check=Mock(side_effect=FusionError("of another bank"))),
    )
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


async def test_a_write_that_began_before_the_exchange_is_made_at_the_new_key(
    moving: Rotation, parts: StoreParts, someone: User, old: str
) -> None:
    await moving.check()
    tried, epoch = list[str](), await parts.profiles.epoch(old)

    async def write(user: User) -> str:
        tried.append(user.key)
        if len(tried) == 1:
            await moving.begin()
            assert await moving.move(old, someone.keys[0], TENANT)
        return await put(parts, user, "z", epoch)

    assert await moving.at(someone, write) == someone.keys[0]
    assert tried == [old, someone.keys[0]]
    assert set(await parts.profiles.items(someone.keys[0])) == set("abcz")


async def test_two_who_move_one_user_do_it_once(server: Servers, raw: Redis, someone: User, old: str) -> None:
    before = await held(raw, old)
    async with StoreParts.opened(server.url) as one, StoreParts.opened(server.url) as other:
        moves = [
            Rotation(each.connection, SECRETS).move(old, someone.keys[0], TENANT) for each in (one, other, one, other)
        ]
        assert await asyncio.gather(*moves) == [True] * 4
    assert (await held(raw, someone.keys[0]), await held(raw, old)) == (before, {})


async def test_a_user_stays_while_a_worker_trains_and_takes_a_waiting_job_along(
    begun: Rotation, parts: StoreParts, someone: User, old: str
) -> None:
    epoch = await parts.profiles.epoch(old)
    waiting = await submitted(parts.jobs, old, "another sample", epoch=epoch)
    lease = await claimed(parts.jobs, waiting.id)
    assert not await begun.move(old, someone.keys[0], TENANT)
    assert (await begun.at(someone, place_of)).key == old  # written there meanwhile
    assert await parts.jobs.release(lease, counts=False)
    assert await begun.move(old, someone.keys[0], TENANT)
    assert await parts.jobs.cancel(waiting.id) == (None, False)
    worker = WorkerSteps(parts)
    async with asyncio.timeout(30):
        while worker.lease is None:  # the old key's entry leads to nothing
            await worker.take()
            await worker.claim()
    assert worker.lease.job.id == (someone.keys[0], waiting.id.number)
    assert await worker.promote()
    assert (await parts.jobs.job(worker.lease.job.id)).state is JobState.SUCCEEDED


async def test_one_pass_moves_everybody_of_these_tenants_and_names_the_others(
    begun: Rotation, parts: StoreParts, raw: Redis
) -> None:
    for number in range(40):
        await parts.put(f"person-{number}", WORDS)
    stranger = UserKeys(SECRET, "unheard of").key("person-1")
    await parts.profiles.commit(stranger, b"", change("a", user_id="person-1"))
    rated = KEYS.key("who only rated")
    await parts.feedback.add(rated, "gen-1", Feedback("base", "none"), None, "")
    tenants = [UserKeys(SECRETS, "empty"), BOTH]
    sweep = await begun.sweep(tenants, lambda _: None)
    assert (sweep.moved, sweep.busy, sweep.strange) == (40, 0, 1)
    assert (await begun.sweep(tenants, lambda _: None)).moved == 0
    for number in range(40):
        new, former = BOTH.keys(f"person-{number}")
        assert (await parts.profiles.load(new)).user_id == f"person-{number}"
        assert await parts.profiles.load(former) is None
    assert await begun.nameless(forget=True) == 0  # rated since the exchange began
    await raw.hset(keys.SECRET, "since", 1 << 52)
    assert [await begun.nameless(forget=forget) for forget in (False, False, True, False)] == [1, 1, 1, 0]
    assert await parts.feedback.entries(rated) == {}


async def test_where_people_are_stored_says_the_store(parts: StoreParts, someone: User) -> None:
    """Of every process with two secrets, in whatever order, the same, before the exchange, during it and after."""
    swapped_secrets = ",".join(reversed(SECRETS.split(",")))
    swapped_user = replace(someone, key=someone.keys[1], keys=someone.keys[::-1])
    both = [(Rotation(parts.connection, SECRETS), someone), (Rotation(parts.connection, swapped_secrets), swapped_user)]

    async def places() -> list[str]:
        return [(await each.at(user, place_of)).key for each, user in both]

    one = Rotation(parts.connection, SECRET)
    await one.check()
    for each, _ in both:
        await each.check()
    assert await places() == [someone.keys[1]] * 2
    assert not await both[1][0].begin()  # the secrets in the wrong order: nobody leaves, and it comes to its end
    assert await both[1][0].nameless(forget=True) == 0
    await both[1][0].end()
    assert await both[0][0].begin()
    with pytest.raises(MtaError, match="swap the two"):
        await both[1][0].begin()
    assert not await both[0][0].begin()
    assert await places() == [someone.keys[0]] * 2
    with pytest.raises(MtaError, match="another than the one"):
        await one.check()
    new_alone = Rotation(parts.connection, SECRETS.partition(",")[0])
    with pytest.raises(MtaError, match="users still move"):
        await new_alone.check()
    await both[0][0].end()
    await new_alone.check()
    for each, _ in both:
        await each.check()
    assert await both[1][0].begin()  # and back
    assert await places() == [someone.keys[1]] * 2


async def test_whoever_moves_back_at_once_has_all_that_was_written_meanwhile(
    begun: Rotation, parts: StoreParts, raw: Redis, someone: User, old: str
) -> None:
    new = someone.keys[0]
    assert await begun.move(old, new, TENANT)
    assert await put(parts, replace(someone, key=new), "z", "") == new
    before = await held(raw, new)
    assert await begun.move(new, old, TENANT)
    assert (await held(raw, old), await held(raw, new)) == (before, {})
    assert await put(parts, replace(someone, key=old), "y", "") == old


async def test_with_one_secret_nothing_more_is_read(parts: StoreParts, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run", "write"):
        monkeypatch.setattr(parts.connection, name, None)
    user = KEYS.user("ada")
    assert await Rotation(parts.connection, SECRET).at(user, place_of) is user


async def test_no_copy_is_made_while_users_move(begun: Rotation, parts: StoreParts) -> None:
    copying = StoreCopying(parts.connection)
    with pytest.raises(MtaError, match="users move to another MTA_SECRET"):
        [entry async for entry in copying.entries(lambda *_: None)]
    await begun.end()
    await parts.put("ada", WORDS)
    copied = copying.entries(lambda *_: None)
    assert await anext(copied)
    await begun.begin()
    with pytest.raises(MtaError, match="has begun meanwhile"):
        [entry async for entry in copied]
