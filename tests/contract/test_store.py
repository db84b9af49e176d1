"""What every store must do with people, held against the real servers at hand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis.asyncio as redis

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.errors import Unavailable, UserErased
from server.store.profiles import TOMBSTONE_S, UNKNOWN_TOMBSTONE_S, Change, ProfileStore
from tests.support.store_parts import KEYS, StoreParts, submitted
from tests.support.stored import LATER_MS, change, opened, profile, vector


@pytest.fixture
def store(parts: StoreParts) -> ProfileStore:
    return parts.profiles


async def test_an_unknown_user_has_nothing(store: ProfileStore, user: str) -> None:
    snapshot = await store.read(user)
    assert await store.load(user) is None
    assert (snapshot.version, snapshot.profile, snapshot.items, snapshot.vectors) == (b"", None, {}, {})
    assert await store.stored_bytes(user) == 0
    assert await store.erase(user, LATER_MS, 0) is None


async def test_what_is_committed_is_read_back(store: ProfileStore, user: str) -> None:
    written = change("zma", extra={99: b"later evidence"})
    assert await store.commit(user, b"", replace(written, put_items=dict(sorted(written.put_items.items()))))
    snapshot = await store.read(user)
    loaded = await store.load(user)
    assert (loaded.user_id, loaded.items, loaded.extra) == ("author-033", 3, {99: b"later evidence"})
    assert np.array_equal(loaded.embedding, written.profile.embedding)
    assert np.array_equal(snapshot.profile.embedding, written.profile.embedding)
    assert snapshot.items == written.put_items
    assert list(snapshot.items) == list("zma")  # the oldest first, whatever their names
    assert all(np.array_equal(snapshot.vectors[name].vector, vector(ord(name))) for name in "zma")


async def test_a_change_from_an_old_version_writes_nothing(store: ProfileStore, user: str) -> None:
    assert await store.commit(user, b"", change("a"))
    version = (await store.read(user)).version
    assert await store.commit(user, version, change("b", drop="a"))
    assert not await store.commit(user, version, change("c"))
    assert not await store.commit(user, b"", change("d"))
    assert list((await store.read(user)).items) == ["b"]


async def test_dropping_an_item_drops_its_vector(store: ProfileStore, user: str) -> None:
    await store.commit(user, b"", change("ab"))
    version = (await store.read(user)).version
    await store.commit(user, version, Change(profile(items=1), {}, {}, ("a",)))
    snapshot = await store.read(user)
    assert list(snapshot.items) == list(snapshot.vectors) == ["b"]


async def test_of_two_concurrent_changes_exactly_one_is_written(server: ValkeyProcess, user: str) -> None:
    async with opened(server.url) as one, opened(server.url) as other:
        for _ in range(20):
            version = (await one.read(user)).version
            outcomes = await asyncio.gather(*(store.commit(user, version, change("a")) for store in (one, other)))
            assert sorted(outcomes) == [False, True]


async def test_a_snapshot_is_of_one_moment(server: ValkeyProcess, user: str) -> None:
    async with opened(server.url) as writer, opened(server.url) as reader:

        async def write() -> None:
            for names in ("ab", "abcd") * 15:
                version = (await writer.read(user)).version
                await writer.commit(user, version, change(names, drop="" if len(names) == 4 else "cd"))

        writing = asyncio.create_task(write())
        while not writing.done():
            snapshot = await reader.read(user)
            if snapshot.profile:
                assert snapshot.profile.items == len(snapshot.items) == len(snapshot.vectors)
        await writing


async def test_an_erasure_leaves_a_tombstone_with_its_answer(store: ProfileStore, raw: redis.Redis, user: str) -> None:
    await store.commit(user, b"", change("abc"))
    erasure = await store.erase(user, LATER_MS, 1234)
    assert (erasure.erased.items, erasure.erased.keys, erasure.rewritten_by_ms) == (3, 3, 1234)
    epoch = await store.epoch(user)
    assert [name async for name in raw.scan_iter(f"*{user}*")] == [f"mta:{{{user}}}:epoch".encode()]
    assert 0 < await raw.ttl(f"mta:{{{user}}}:epoch") <= TOMBSTONE_S
    assert await store.load(user) is None
    assert await store.erase(user, LATER_MS, 5678) == erasure
    epoch = await store.epoch(user)
    assert await store.commit(user, b"", change("a"), epoch)
    assert await store.epoch(user) == epoch
    again = await store.erase(user, LATER_MS, 5678)
    assert (again.erased.items, again.rewritten_by_ms) == (1, 5678)


async def test_a_change_that_was_under_way_when_the_user_was_erased_is_refused(store: ProfileStore, user: str) -> None:
    before = await store.read(user)
    assert await store.commit(user, before.version, change("a"), before.epoch)
    await store.erase(user, LATER_MS, 0)
    with pytest.raises(UserErased):
        await store.commit(user, before.version, change("b"), before.epoch)
    empty = await store.read(user)
    assert (empty.profile, empty.items) == (None, {})
    assert await store.commit(user, empty.version, change("c"), empty.epoch)


async def test_erasing_an_unknown_user_refuses_changes_under_way(store: ProfileStore, user: str) -> None:
    before = await store.read(user)
    assert await store.erase(user, LATER_MS, 0) is None
    with pytest.raises(UserErased):
        await store.commit(user, before.version, change("a"), before.epoch)


async def test_an_erasure_that_comes_too_late_does_nothing(store: ProfileStore, user: str) -> None:
    await store.commit(user, b"", change("a"))
    with pytest.raises(Unavailable, match="too long"):
        await store.erase(user, 1, 0)
    assert await store.load(user) is not None
    assert await store.epoch(user) == ""


async def test_the_user_id_stands_in_the_record_alone(store: ProfileStore, raw: redis.Redis, user: str) -> None:
    await store.commit(user, b"", change("abc", user_id="someone-unmistakable"))
    holding = [name async for name in raw.scan_iter(f"mta:*{user}*") if b"unmistakable" in await raw.dump(name)]
    assert holding == [f"mta:{{{user}}}:profile".encode()]


async def test_a_user_without_items_takes_less_than_a_kibibyte(store: ProfileStore, user: str) -> None:
    await store.commit(user, b"", change(user_id="u" * 36))
    assert 0 < await store.stored_bytes(user) < 1024


async def test_a_record_that_cannot_be_read_is_reported(store: ProfileStore, raw: redis.Redis, user: str) -> None:
    await raw.set(f"mta:{{{user}}}:profile", b"\x07garbage")
    with pytest.raises(Unavailable, match="cannot read"):
        await store.load(user)


async def test_erasing_nobody_is_one_write_that_is_kept_for_minutes_and_no_rewrite(
    parts: StoreParts, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], parts.connection.write

    async def noted(script: str, names: Sequence[str], *arguments: object) -> object:
        written.append(names[0])
        return await write(script, names, *arguments)

    monkeypatch.setattr(parts.connection, "write", noted)
    tombstone = f"mta:{{{KEYS.key('nobody')}}}:epoch"
    for _ in range(2):
        assert await parts.erase("nobody") is None
    assert written == [tombstone] * 2
    assert [name async for name in raw.scan_iter()] == [tombstone.encode()]
    assert 0 < await raw.ttl(tombstone) <= UNKNOWN_TOMBSTONE_S < 3600


async def test_asking_again_makes_no_tombstone_shorter_or_younger(parts: StoreParts, raw: redis.Redis) -> None:
    key = KEYS.key("somebody")
    await parts.profiles.commit(key, b"", change("a"))
    erasure = await parts.erase("somebody")
    assert erasure.rewritten_by_ms > 0
    await raw.expire(f"mta:{{{key}}}:epoch", TOMBSTONE_S - 100)
    assert await parts.erase("somebody") == erasure
    assert UNKNOWN_TOMBSTONE_S < await raw.ttl(f"mta:{{{key}}}:epoch") <= TOMBSTONE_S - 100
    before = await parts.profiles.read(key)
    await raw.expire(f"mta:{{{key}}}:epoch", 1)
    assert await parts.erase("somebody") == erasure
    assert await raw.ttl(f"mta:{{{key}}}:epoch") > 1  # longer than what was under way takes
    with pytest.raises(UserErased):
        await parts.profiles.commit(key, before.version, change("a"), before.epoch)


USER, WORDS = "somebody-who-was-here", "words that nobody shall find again"


async def store_somebody(parts: StoreParts) -> None:
    await parts.put(USER, WORDS)
    await submitted(parts.jobs, KEYS.key(USER), WORDS)


async def test_servers_logs_of_commands_forget_who_is_erased(
    parts: StoreParts, server: ValkeyProcess | ValkeyCluster
) -> None:
    nodes = [server] if isinstance(server, ValkeyProcess) else server.nodes
    before = [
        ask(node, "CONFIG GET", "slowlog-log-slower-than", "commandlog-*-than", "*log-*max-len") for node in nodes
    ]

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
        await store_somebody(parts)
        assert [text in logged() for text in (USER, WORDS)] == [True, True]
        assert await parts.erase(USER)
        assert [text in logged() for text in (USER, WORDS)] == [False, False]
    finally:
        for node, settings in zip(nodes, before, strict=True):
            ask(node, "CONFIG SET", *itertools.chain(*settings.items()))


async def test_where_logs_may_not_be_reset_users_are_erased_all_the_same(tmp_path: Path) -> None:
    hidden = [word for name in ("SLOWLOG", "COMMANDLOG") for word in ("--rename-command", name, "")]
    server = ValkeyProcess(tmp_path, (*DURABLE, *hidden)).start()
    try:
        async with StoreParts.opened(server.url) as parts:
            await store_somebody(parts)
            assert await parts.erase(USER)
            assert await parts.profiles.load(KEYS.key(USER)) is None
    finally:
        server.kill()
