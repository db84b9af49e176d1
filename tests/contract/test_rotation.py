"""What must hold while users move from the key by one secret to the key by another; on a cluster the two are apart."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from adapters.errors import MtaError
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable, UserErased
from server.store import rotation
from server.store.backup.copying import StoreCopying
from server.store.feedback import NO_PROFILE_S, Feedback
from server.store.jobs import JobState
from server.store.profiles import TOMBSTONE_S
from server.store.redis import keys
from server.store.rotation import Rotation
from server.store.tallies import Counts
from server.store.tenants.user_key import User, UserKeys
from tests.support.moving import BOTH, CELL, MOVE_WRITES, SECRETS, WORDS, put
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
    on_disk,
    stored,
    submitted,
    until_forgotten,
)
from tests.support.valkeys.cluster import ValkeyCluster

Servers = ValkeyProcess | ValkeyCluster


async def place_of(user: User) -> User:
    return user


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
    assert (await raw.hgetall(keys.epoch(new))).items() >= tombstone.items()
    assert TOMBSTONE_S - 60 < await raw.ttl(keys.epoch(new)) <= TOMBSTONE_S
    assert replace((await parts.jobs.jobs(new))[-1], id=job.id) == job
    assert (await parts.profiles.state(old))[1] == new
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
    assert 0 < await raw.ttl(keys.epoch(old)) <= rotation.MOVED_S
    again = await held(raw, new)
    assert await begun.move(old, new, TENANT)
    assert await held(raw, new) == again


async def test_moved_user_is_found_and_old_key_refuses_all_writes(
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
    with pytest.raises(UserErased):
        await parts.profiles.begin(old)
    for epoch in {*epochs, await parts.profiles.leave_mark(old), marked}:
        with pytest.raises(UserErased):
            await parts.profiles.commit(old, b"", change("z"), epoch)
        with pytest.raises(UserErased):
            await submitted(parts.jobs, old, epoch=epoch)
        with pytest.raises(UserErased):
            await parts.feedback.add(old, "gen-2", Feedback("base", "none"), None, epoch)
        assert not await parts.tallies.add(old, epoch, {CELL: Counts(answers=1)})
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


async def test_write_begun_before_exchange_lands_at_the_new_key(
    moving: Rotation, parts: StoreParts, someone: User, old: str
) -> None:
    await moving.check()
    tried, epoch = list[str](), await parts.profiles.begin(old)

    async def write(user: User) -> str:
        tried.append(user.key)
        if len(tried) == 1:
            await moving.begin()
            assert await moving.move(old, someone.keys[0], TENANT)
        return await put(parts, user, "z", epoch)

    assert await moving.at(someone, write) == someone.keys[0]
    assert tried == [old, someone.keys[0]]
    assert set(await parts.profiles.items(someone.keys[0])) == set("abcz")


async def test_user_written_across_the_exchange_ends_at_new_key(
    moving: Rotation, parts: StoreParts, someone: User
) -> None:
    await moving.check()
    (new, former), epoch = someone.keys, await moving.begin_write(someone)

    async def write(user: User) -> str:
        await moving.begin()
        await moving.end()
        return await put(parts, user, "z", epoch)

    assert await moving.at(someone, write) == former
    assert [bool(await parts.profiles.load(key)) for key in (new, former)] == [True, False]


@pytest.mark.usefixtures("old", "quick_rewrites")
async def test_erased_words_leave_the_files_of_the_former_server(
    begun: Rotation, parts: StoreParts, nodes: list[ValkeyProcess], someone: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "GRACE_MS", 300)
    assert await begun.move(*someone.keys[::-1], TENANT)
    await begun.end()
    assert await parts.erase(someone.id, UserKeys(SECRETS.partition(",")[0], TENANT))
    assert on_disk(WORDS, *nodes)
    await until_forgotten(parts.connection, WORDS, *nodes)


async def test_two_who_move_one_user_do_it_once(server: Servers, raw: Redis, someone: User, old: str) -> None:
    before = await held(raw, old)
    async with StoreParts.opened(server.url) as one, StoreParts.opened(server.url) as other:
        moves = [
            Rotation(each.connection, SECRETS).move(old, someone.keys[0], TENANT) for each in (one, other, one, other)
        ]
        assert await asyncio.gather(*moves) == [True] * 4
    assert (await held(raw, someone.keys[0]), await held(raw, old)) == (before, {})


async def test_move_waits_for_training_and_takes_the_waiting_job(
    begun: Rotation, parts: StoreParts, someone: User, old: str
) -> None:
    epoch = await parts.profiles.begin(old)
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


async def test_sweep_moves_all_users_of_tenants_and_counts_strangers(
    begun: Rotation, parts: StoreParts, raw: Redis
) -> None:
    for number in range(40):
        await parts.put(f"person-{number}", WORDS)
    stranger = UserKeys(SECRET, "unheard of").key("person-1")
    await stored(parts.profiles, stranger, change("a", user_id="person-1"))
    rated = KEYS.key("who only rated")
    await parts.feedback.add(rated, "gen-1", Feedback("base", "none"), None, "")
    tenants = [UserKeys(SECRETS, "empty"), BOTH]
    sweep = await begun.sweep(tenants, lambda _: None)
    assert (sweep.moved, sweep.busy, sweep.unknown) == (40, 0, 1)
    assert (await begun.sweep(tenants, lambda _: None)).moved == 0
    for number in range(40):
        new, former = BOTH.keys(f"person-{number}")
        assert (await parts.profiles.load(new)).user_id == f"person-{number}"
        assert await parts.profiles.load(former) is None
    await raw.persist(keys.feedback(rated))  # as the version before left it
    assert await begun.let_nameless_expire() == 1
    assert 0 < await raw.ttl(keys.feedback(rated)) <= NO_PROFILE_S


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
    await both[1][0].begin()  # the secrets in the wrong order: nobody leaves, and it comes to its end
    await both[1][0].end()
    await both[0][0].begin()
    with pytest.raises(MtaError, match="swap the two"):
        await both[1][0].begin()
    await both[0][0].begin()
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
    await both[1][0].begin()  # and back
    assert await places() == [someone.keys[1]] * 2


async def test_move_back_keeps_everything_written_meanwhile(
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
