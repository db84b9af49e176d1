"""What every store must do with people, also at its `maxmemory`, held against the real servers at hand."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from redis.asyncio import Redis

from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable, UserErased
from server.store import profiles
from server.store.backup.copying import StoreCopying
from server.store.feedback import Feedback
from server.store.profile_record import StoredItem
from server.store.profiles import MARK_S, TOMBSTONE_S, Change, ProfileStore
from server.store.queue import UserQueue
from server.store.redis import keys
from server.store.rotation import Rotation
from server.store.samples import Sample
from server.store.tallies import TALLY_S
from server.store.tenants.access_keys import Scope, access_key, new_secret
from server.store.tenants.holdings import Held
from server.store.tenants.rates import Rate, Use
from tests.support.moving import CELL
from tests.support.store_parts import (
    BANK,
    KEYS,
    LATER_MS,
    SECRET,
    TENANT,
    StoreParts,
    WorkerSteps,
    change,
    on_disk,
    opened,
    profile,
    stored,
    submitted,
    until_forgotten,
    vector,
)
from tests.support.valkeys.cluster import ValkeyCluster, ask

Servers = ValkeyProcess | ValkeyCluster
Nodes = list[ValkeyProcess]


@pytest.fixture
def store(parts: StoreParts) -> ProfileStore:
    return parts.profiles


async def test_a_long_history_is_stored_in_one_step(store: ProfileStore, user: str) -> None:
    many = {f"{number}": StoredItem(number, {"text": "a"}) for number in range(4096)}
    assert await stored(store, user, Change(profile(items=len(many)), many, {}, ()))
    assert (await store.read(user)).items == many


async def test_unknown_user_is_empty_and_one_without_items_is_small(store: ProfileStore, user: str) -> None:
    snapshot = await store.read(user)
    assert await store.load(user) is None
    assert (snapshot.version, snapshot.profile, snapshot.items, snapshot.vectors) == (b"", None, {}, {})
    assert (await store.measure(user))[:2] == (b"", Held(people=0, bytes=0, adapters=0))
    assert await stored(store, user, change(user_id="u" * 36))
    assert 0 < (await store.measure(user))[1]["bytes"] < 1024


async def test_what_is_committed_is_read_back(store: ProfileStore, raw: Redis, user: str) -> None:
    written = change("zma", user_id="someone-unmistakable", extra={99: b"later evidence"})
    assert await stored(store, user, replace(written, put_items=dict(sorted(written.put_items.items()))))
    snapshot = await store.read(user)
    loaded = await store.load(user)
    assert (loaded.user_id, loaded.items, loaded.extra) == ("someone-unmistakable", 3, {99: b"later evidence"})
    assert np.array_equal(loaded.embedding, written.profile.embedding)
    assert np.array_equal(snapshot.profile.embedding, written.profile.embedding)
    assert snapshot.items == written.put_items
    assert list(snapshot.items) == list("zma")  # the oldest first, whatever their names
    assert all(np.array_equal(snapshot.vectors[name].vector, vector(ord(name))) for name in "zma")
    holding = [name async for name in raw.scan_iter(f"mta:*{user}*") if b"unmistakable" in await raw.dump(name)]
    assert holding == [keys.profile(user).encode()]
    await raw.set(keys.profile(user), b"\x07garbage")
    with pytest.raises(Unavailable, match="cannot read"):
        await store.load(user)


async def test_a_change_from_an_old_version_writes_nothing(store: ProfileStore, user: str) -> None:
    assert await stored(store, user, change("ab"))
    version = (await store.read(user)).version
    assert await store.commit(user, version, Change(profile(items=1), {}, {}, ("a",)))
    assert not await store.commit(user, version, change("c"))
    assert not await stored(store, user, change("d"))
    snapshot = await store.read(user)
    assert list(snapshot.items) == list(snapshot.vectors) == ["b"]


async def test_one_of_two_commits_wins_and_snapshots_are_consistent(server: Servers, user: str) -> None:
    async with opened(server.url) as one, opened(server.url) as other:
        epoch = await one.begin(user)
        for _ in range(20):
            version = (await one.read(user)).version
            commits = (store.commit(user, version, change("ab"), epoch) for store in (one, other))
            outcomes = await asyncio.gather(*commits)
            assert sorted(outcomes) == [False, True]

        async def write() -> None:
            for names in ("ab", "abcd") * 15:
                version = (await one.read(user)).version
                await one.commit(user, version, change(names, drop="" if len(names) == 4 else "cd"))

        writing = asyncio.create_task(write())
        while not writing.done():
            snapshot = await other.read(user)
            assert snapshot.profile.items == len(snapshot.items) == len(snapshot.vectors)
        await writing


async def test_an_erasure_leaves_a_tombstone_with_its_answer(store: ProfileStore, raw: Redis, user: str) -> None:
    before = await store.begin(user)
    assert await store.commit(user, b"", change("abc"), before)
    with pytest.raises(Unavailable, match="too long"):
        await store.erase(user, 1, 0)
    assert await store.load(user) is not None
    assert await store.begin(user) == ""
    erasure = await store.erase(user, LATER_MS, 1234)
    assert (erasure.erased.items, erasure.erased.keys, erasure.rewritten_by_ms) == (3, 3, 1234)
    assert [name async for name in raw.scan_iter(f"*{user}*")] == [keys.epoch(user).encode()]
    assert 0 < await raw.ttl(keys.epoch(user)) <= TOMBSTONE_S
    with pytest.raises(UserErased):
        await store.commit(user, b"", change("b"), before)
    empty = await store.read(user)
    assert (empty.profile, empty.items) == (None, {})
    assert await store.erase(user, LATER_MS, 5678) == erasure
    epoch = await store.begin(user)
    assert await store.commit(user, b"", change("a"), epoch)
    assert epoch.startswith(await store.begin(user))
    again = await store.erase(user, LATER_MS, 5678)
    assert (again.erased.items, again.rewritten_by_ms) == (1, 5678)


async def test_erasing_nobody_leaves_nothing_and_rewrites_nothing(
    parts: StoreParts, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], parts.connection.write

    async def noted(script: str, names: Sequence[str], *arguments: object) -> object:
        written.append(names[-1])
        return await write(script, names, *arguments)

    monkeypatch.setattr(parts.connection, "write", noted)
    for _ in range(2):
        await parts.profiles.begin(KEYS.key("nobody"))
        assert await parts.erase("nobody") is None
    assert written == [keys.epoch(KEYS.key("nobody"))] * 2
    assert [name async for name in raw.scan_iter()] == []


async def test_a_write_to_nobody_that_outlasts_its_mark_is_refused(store: ProfileStore, raw: Redis, user: str) -> None:
    epoch = await store.begin(user)
    assert 0 < await raw.ttl(keys.epoch(user)) <= MARK_S
    await raw.delete(keys.epoch(user))  # its time is over
    with pytest.raises(UserErased):
        await store.commit(user, b"", change("a"), epoch)
    await store.begin(user)
    with pytest.raises(UserErased):
        await store.commit(user, b"", change("a"), epoch)


async def test_a_write_to_nobody_without_a_mark_is_refused(store: ProfileStore, user: str) -> None:
    with pytest.raises(UserErased):
        await store.commit(user, b"", change("a"))


async def test_an_erasure_of_nobody_refuses_all_writes_begun(parts: StoreParts, user: str) -> None:
    epoch = await parts.profiles.begin(user)
    assert await parts.profiles.begin(user) == epoch
    assert await parts.profiles.erase(user, LATER_MS, 0) is None
    late = await parts.profiles.begin(user)
    for refused in (
        parts.profiles.commit(user, b"", change("a"), epoch),
        submitted(parts.jobs, user, epoch=epoch),
        parts.feedback.add(user, "gen-1", Feedback("base", "none"), None, epoch),
    ):
        with pytest.raises(UserErased):
            await refused
    assert await parts.profiles.commit(user, b"", change("a"), late)
    assert await parts.profiles.commit(user, (await parts.profiles.read(user)).version, change("b"), late)


async def test_a_mark_outlives_the_tombstone_that_it_stands_in(store: ProfileStore, raw: Redis, user: str) -> None:
    await stored(store, user, change("a"))
    assert await store.erase(user, LATER_MS, 1)
    await raw.expire(keys.epoch(user), 30)
    epoch = await store.begin(user)
    assert 30 < await raw.ttl(keys.epoch(user)) <= MARK_S
    assert await store.erase(user, LATER_MS, 1)  # the same answer again
    with pytest.raises(UserErased):
        await store.commit(user, b"", change("a"), epoch)


async def test_asking_again_makes_no_tombstone_younger(parts: StoreParts, raw: Redis) -> None:
    key = KEYS.key("somebody")
    await stored(parts.profiles, key, change("a"))
    erasure = await parts.erase("somebody")
    assert erasure.rewritten_by_ms > 0
    await raw.expire(keys.epoch(key), TOMBSTONE_S - 100)
    assert await parts.erase("somebody") == erasure
    assert TOMBSTONE_S - 200 < await raw.ttl(keys.epoch(key)) <= TOMBSTONE_S - 100


USER, WORDS = "somebody-who-was-here", "words that nobody shall find again"


async def test_servers_logs_of_commands_forget_who_is_erased(parts: StoreParts, nodes: Nodes) -> None:
    wanted = ("slowlog-log-slower-than", "commandlog-*-than", "*log-*max-len")
    before = [ask(node, "CONFIG GET", *wanted) for node in nodes]

    def logged() -> str:
        """Only Valkey has logs of three kinds."""
        found = [ask(node, "SLOWLOG GET", -1) for node in nodes]
        for node, settings in zip(nodes, before, strict=True):
            kinds = ("slow", "large-request", "large-reply") if "commandlog-reply-larger-than" in settings else ()
            found += [ask(node, "COMMANDLOG GET", -1, kind) for kind in kinds]
        return repr(found)

    try:
        for node, settings in zip(nodes, before, strict=True):
            for name in settings:
                ask(node, "CONFIG SET", name, 100_000 if name.endswith("max-len") else 0)
        for commands, left in ((profiles._CLEAR_LOGS, False), (("RENAMED",), True)):  # managed services refuse
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(profiles, "_CLEAR_LOGS", commands)
                await parts.put(USER, WORDS)
                key = KEYS.key(USER)
                await submitted(parts.jobs, key, WORDS, epoch=await parts.profiles.begin(key))
                assert [text in logged() for text in (USER, WORDS)] == [True, True]
                assert await parts.erase(USER)
                assert [text in logged() for text in (USER, WORDS)] == [left, left]
    finally:
        for node, settings in zip(nodes, before, strict=True):
            ask(node, "CONFIG SET", *itertools.chain(*settings.items()))


_ROW = re.compile(r"^    (mta:.+?)  +(string|hash|list|set|zset)  (.+)$", re.MULTILINE)
_PARTS = {
    "<user key>": "[a-z2-7]{26}",
    "<n>": "[0-9]+",
    "<queue>": f"(jobs|sign):{BANK}",
    "<bank>": BANK,
    "<server>": "[0-9a-f]{40}",
    "<what>": "[a-z]+",
    "<owner>": "(key|user|tenant|quota)-[^/]+",
    "<engines>": "[0-9a-f]{16}",
    "<quotas>": "[0-9]+",
    "<week>": "[0-9]{4}",
    "<tenant>": TENANT,
}
_EXPIRES = re.compile("7 days|3 weeks|ten windows|after the last lease")


def fits(name: str, pattern: str) -> bool:
    pattern = re.escape(pattern).replace(r"\ ", " ")
    for part, meant in _PARTS.items():
        pattern = pattern.replace(part, meant)
    return re.fullmatch(pattern, name) is not None


async def test_whatever_is_written_stands_in_the_table_of_keys(
    server: Servers, parts: StoreParts, raw: Redis, old: str
) -> None:
    await parts.to_sign.add(old)
    await WorkerSteps(parts).take_signing()
    await parts.to_sign.count_attempt(old)
    await parts.put("bob", "text")
    await UserQueue(parts.connection, "jobs", BANK).reserve(KEYS.key("bob"), background=True)
    await parts.erase("bob")
    await parts.tallies.add_sums(TENANT, "a token", {CELL: (1.0,)})
    await parts.feedback.add(KEYS.key("cai"), "gen-1", Feedback("base", "none"), None, "")
    await parts.keys.add(access_key(new_secret(), "app", "acme", Scope))
    await parts.keys.note_used(["a digest"], 1)
    await Rotation(parts.connection, SECRET).check()
    assert (await parts.rates.consume([Use(Rate("tokens", "user-x", 5), 1)]))[0].fits
    for held in ("running/key-x", "recounted/42", f"gateways/{'0' * 16}"):
        assert await parts.rates.acquire(held, ["it"], 60)
    await raw.set(keys.RESTORING, "a copy")
    await StoreCopying(parts.connection).note_copy(1e9)

    table = {name: (kind, _EXPIRES.search(rest) is not None) for name, kind, rest in _ROW.findall(keys.__doc__ or "")}
    seen, expiring = set(), set()
    for name in [name.decode() async for name in raw.scan_iter()]:
        (row,) = [row for row in table if fits(name, row)]
        kind, expires = table[row]
        assert (name, (await raw.type(name)).decode()) == (name, kind)
        left_s = await raw.ttl(name)
        assert left_s == -1 or (expires and left_s <= TALLY_S), name
        seen.add(row)
        expiring |= {row} if left_s > 0 else set()
    assert expiring == {row for row, (_, expires) in table.items() if expires}
    of_users = {row for row in table if row.startswith("mta:{<user key>}:")} - {"mta:{<user key>}:job:<n>"}
    assert {name.replace("a" * 26, "<user key>") for name in keys.of_user("a" * 26)} == of_users
    of_the_other = "mta:{rewrite}" if isinstance(server, ValkeyCluster) else "mta:{rewrite}:<server>"
    assert seen == table.keys() - {of_the_other}


ROOM_BYTES = 1_200_000  # far more than what connections and scripts take of it meanwhile
ANN, BOB, CAI = "ann", "bob", "cai"
SAMPLE = "a sample of ann's"


@pytest.fixture
async def full(server: Servers, nodes: Nodes, parts: StoreParts) -> AsyncIterator[StoreParts]:
    """Stores on servers without room. Ann has a profile, a user adapter, samples, a job and a call in them; a job of
    Cai's was announced and never stored. There is an API key, which has leaked."""
    await parts.keys.add(access_key(new_secret(), "leaked", "acme", (Scope.GENERATE,)))
    await parts.put(ANN, "about ann")
    worker, key = WorkerSteps(parts), KEYS.key(ANN)
    await submitted(parts.jobs, key, SAMPLE)
    await worker.take()
    await worker.claim()
    assert await worker.promote()
    await submitted(parts.jobs, key, SAMPLE, "another")
    await parts.to_sign.add(key)
    await parts.put(CAI, "about cai")
    await UserQueue(parts.connection, "jobs", BANK).reserve(KEYS.key(CAI))
    for node in nodes:
        ask(node, "CONFIG SET", "maxmemory", ask(node, "INFO", "memory")["used_memory"] + ROOM_BYTES)
        with pytest.raises(Unavailable, match="full"):
            for user in (f"one of many {number}" for number in itertools.count()):
                if server is node or server.home_of(keys.profile(KEYS.key(user))) is node:
                    await parts.put(user, "x" * 50_000)
    for node in nodes:  # what is let go now and then makes no room
        ask(node, "CONFIG SET", "maxmemory", ask(node, "INFO", "memory")["maxmemory"] - ROOM_BYTES // 2)
    yield parts
    for node in nodes:
        ask(node, "CONFIG SET", "maxmemory", 0)


@pytest.mark.usefixtures("quick_rewrites")
async def test_a_full_store_refuses_what_would_be_stored_and_erases(full: StoreParts, raw: Redis, nodes: Nodes) -> None:
    for refused in (
        full.put(BOB, "about bob"),
        submitted(full.jobs, KEYS.key(BOB)),
        full.to_sign.add(KEYS.key(BOB)),
        full.feedback.add(KEYS.key(BOB), "gen-1", Feedback("merged", "none"), Sample([], "said"), ""),
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
    [leaked] = (await full.keys.all()).keys
    assert await full.keys.revoke(leaked.digest, 7)
    another = access_key(new_secret(), "another", "acme", (Scope.GENERATE,))
    assert await full.keys.add(another)
    revoked = {key.digest: key.revoked_ms for key in (await full.keys.all()).keys}
    assert revoked == {leaked.digest: 7, another.digest: None}

    # Limits hold for whoever filled it.
    use = Use(Rate("requests", "key-1", 1), 1)
    assert [(await full.rates.consume([use]))[0].fits for _ in range(2)] == [True, False]
    assert await full.rates.acquire("running/key-1", ["one"], 60, 1) == 1
    assert await full.rates.acquire("running/key-1", ["two"], 60, 1) is None
    await full.rates.renew("running/key-1", ["one"], 60)

    # Users are erased, also from its file, until there is room again.
    key = KEYS.key(ANN)
    assert on_disk(SAMPLE, *nodes)
    erasure = await full.erase(ANN)
    erased = erasure.erased
    assert (erased.items, erased.samples, erased.jobs, erased.adapters) == (1, 2, 2, 1)
    assert [name async for name in raw.scan_iter(f"*{key}*")] == [keys.epoch(key).encode()]
    assert await full.erase(ANN) == erasure
    assert await full.erase(CAI)
    assert not await raw.sismember(keys.adapted(BANK), key)
    for name in (*keys.queue("jobs", BANK)[:2], *keys.queue("sign", BANK)[:2]):
        assert await raw.type(name) in (b"none", b"zset")
        assert await raw.zscore(name, key) is None
    with pytest.raises(Unavailable, match="full"):
        await full.put(BOB, "about bob")
    await until_forgotten(full.connection, SAMPLE, *nodes)
    number, memory = itertools.count(), [ask(node, "INFO", "memory") for node in nodes]
    while any(of["used_memory"] > of["maxmemory"] for of in memory):
        await full.erase(f"one of many {next(number)}")
        memory = [ask(node, "INFO", "memory") for node in nodes]
    await full.put(BOB, "about bob")
