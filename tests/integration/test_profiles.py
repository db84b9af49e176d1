"""The write side of profiles on a real store: what is embedded, when, and with which embedder."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import redis.asyncio as redis

from bank.items.profile import Item, Vectors
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bench.rig.valkey import ValkeyProcess, free_port
from server.gateway.access.shares import FairQueue, Shares
from server.gateway.users.histories import HistoryLimit
from server.gateway.users.profiles import EMBED_BATCH, Profiles, ProfileUpdate
from server.store.profile_record import AdapterNote, Profile
from server.store.profiles import Change, ProfileStore
from server.store.queue import UserQueue
from server.store.redis.servers.connection import RedisConnection
from server.store.rotation import Rotation
from server.store.tenants.user_key import User, UserKeys
from tests.support.store_parts import opened

KEYS = UserKeys("a secret for tests only", "profiles")
OLD = "00" * 8
_numbers = itertools.count()


class CountingEmbedder:
    """The real embedder, with a gate and a record of what it embeds; it may pretend to be another one."""

    def __init__(self, inner: Embedder, identity: str | None = None) -> None:
        self.inner = inner
        self.id = identity or inner.id
        self.texts: list[str] = []
        self.largest_batch = 0
        self.gate, self._asked = threading.Event(), threading.Event()
        self.gate.set()

    async def asked(self) -> None:
        """Return once it was asked to embed something."""
        assert await asyncio.to_thread(self._asked.wait, 30)

    def embed(self, texts: Sequence[str]) -> Vectors:
        self._asked.set()
        self.gate.wait(30)
        self.texts += texts
        self.largest_batch = max(self.largest_batch, len(texts))
        return self.inner.embed(texts)


@pytest.fixture
async def store(valkey: ValkeyProcess) -> AsyncIterator[ProfileStore]:
    async with opened(valkey.url) as store:
        yield store


@pytest.fixture
def writing(store: ProfileStore, embedder: Embedder) -> Profiles:
    return profiles(store, CountingEmbedder(embedder))


@pytest.fixture
def user() -> User:
    return KEYS.user(f"user-{next(_numbers)}")


class Begun(Profiles):
    """Begins a write when it is made, not before its body arrives."""

    async def replace(self, user: User, items: Sequence[Item], epoch: str) -> ProfileUpdate:
        return await super().replace(user, items, epoch or await self.rotation.begin_write(user))

    async def add(self, user: User, items: Sequence[Item], epoch: str) -> ProfileUpdate:
        return await super().add(user, items, epoch or await self.rotation.begin_write(user))

    async def current(self, user: User) -> Profile | None:
        return (await self.find(user))[1]


def profiles(store: ProfileStore, embedder: CountingEmbedder) -> Profiles:
    rotation, limit = Rotation(store._connection, None), HistoryLimit(64, 1 << 20)
    turns, places = FairQueue(Shares(lambda: 1)), FairQueue(Shares(lambda: 50))
    return Begun(rotation, embedder, get_task("chat"), ThreadPoolExecutor(1), turns, places, limit, MagicMock())


def items(*names: str) -> list[Item]:
    return [Item(name, {"text": f"a text about {name}"}) for name in names]


async def test_only_new_items_are_embedded(writing: Profiles, user: User) -> None:
    embedder = writing.embedder
    await writing.replace(user, items("waves", "roses", "chess"), "")
    embedder.texts.clear()
    await writing.replace(user, items("waves", "roses", "chess"), "")
    await writing.replace(user, items("chess", "waves"), "")
    assert embedder.texts == []
    mean = embedder.inner.embed(["a text about waves", "a text about chess"]).mean(axis=0)
    embedding = (await writing.current(user)).embedding
    assert float(embedding @ mean / np.linalg.norm(mean)) == pytest.approx(1, abs=1e-3)
    await writing.add(user, items("bread"), "")
    assert embedder.texts == ["a text about bread"]
    await writing.add(user, [Item("bread", {"text": "another text"})], "")
    assert embedder.texts == ["a text about bread", "another text"]


async def test_tenants_take_turns_at_the_embedder(writing: Profiles) -> None:
    embedder = writing.embedder
    embedder.gate.clear()
    many = [KEYS.user(f"many-{number}") for number in range(20)]
    theirs = [asyncio.create_task(writing.replace(user, items(*user.id.split("-")), "")) for user in many]
    while writing.turns.waiting < len(many) - 1:
        await asyncio.sleep(0.01)
    own = asyncio.create_task(
        writing.replace(UserKeys("a secret for tests only", "other").user("ada"), items("waves"), "")
    )
    while writing.turns.waiting < len(many):
        await asyncio.sleep(0.01)
    embedder.gate.set()
    await own
    assert embedder.texts.index("a text about waves") <= 2 * len("ab")  # after two of theirs at most
    await asyncio.gather(*theirs)


async def test_long_changes_of_a_tenant_queue_and_short_ones_pass(writing: Profiles) -> None:
    embedder, names = writing.embedder, [f"{place}" for place in range(3 * EMBED_BATCH)]
    embedder.gate.clear()
    asked = [items(*(f"long-{name}" for name in names)), items(*(f"later-{name}" for name in names)), items("short")]
    tasks = []
    for number, given in enumerate(asked):
        tasks.append(asyncio.create_task(writing.replace(KEYS.user(f"in-line-{number}"), given, "")))
        await embedder.asked()
    while writing.turns.waiting < 1:
        await asyncio.sleep(0.01)
    embedder.gate.set()
    await asyncio.gather(*tasks)
    kinds = [text.removeprefix("a text about ").partition("-")[0] for text in embedder.texts]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["long", "short", "long", "later"]


async def test_only_so_many_changes_hold_a_history_at_once(
    writing: Profiles, store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing.places = FairQueue(Shares(lambda: 4))
    embedder, read, reads = writing.embedder, store.read, list[str]()
    monkeypatch.setattr(ProfileStore, "read", lambda self, key: reads.append(key) or read(key))
    embedder.gate.clear()
    users = [KEYS.user(f"crowded-{number}") for number in range(10)]
    tasks = [asyncio.create_task(writing.replace(user, items(user.id), "")) for user in users]
    while writing.places.waiting < len(users) - 2:  # half the places are for other tenants
        await asyncio.sleep(0.01)
    await embedder.asked()
    assert len(reads) == 2
    embedder.gate.set()
    assert [update.changed for update in await asyncio.gather(*tasks)] == [1] * len(users)


async def test_a_write_stands_though_the_signing_queue_is_away(
    writing: Profiles, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = RedisConnection(f"redis://127.0.0.1:{free_port()}", require_durable=False)  # another server of a cluster
    writing.signing = UserQueue(nobody, "sign", "9f2c41d0")
    assert (await writing.replace(user, items("waves"), "")).changed == 1
    assert "a signature could not be requested" in caplog.text
    await nobody.close()


async def test_another_embedders_embedding_is_remade_once(store: ProfileStore, embedder: Embedder, user: User) -> None:
    old, new = CountingEmbedder(embedder, OLD), CountingEmbedder(embedder)
    await profiles(store, old).replace(user, items("waves", "roses"), "")
    reading = profiles(store, new)
    for _ in range(2):
        assert (await reading.current(user)).embedder == embedder.id
        assert sorted(new.texts) == ["a text about roses", "a text about waves"]
    other = KEYS.user(f"user-{next(_numbers)}")
    await profiles(store, old).replace(other, items("waves", "roses"), "")
    assert (await reading.add(other, items("chess"), "")).changed == 1
    assert len(new.texts) == 2 + 3
    assert {vector.embedder for vector in (await store.read(other.key)).vectors.values()} == {embedder.id}


async def test_concurrent_requests_share_a_new_embedding(store: ProfileStore, embedder: Embedder, user: User) -> None:
    await profiles(store, CountingEmbedder(embedder, OLD)).replace(user, items("waves", "roses"), "")
    new = CountingEmbedder(embedder)
    new.gate.clear()
    reading = profiles(store, new)
    waiting = [asyncio.create_task(reading.current(user)) for _ in range(10)]
    await new.asked()
    waiting[0].cancel()  # the others do not notice
    new.gate.set()
    assert {profile.embedder for profile in await asyncio.gather(*waiting[1:]) if profile} == {embedder.id}
    assert len(new.texts) == 2


async def test_the_rest_of_the_record_survives_changes(writing: Profiles, user: User) -> None:
    note, extra = AdapterNote("a" * 26, "mta3:9f2c41d0:shared:c", 27_000, 1), {200: b"of a later version" * 80}
    await writing.add(user, items("surf"), "")
    snapshot = await writing.store.read(user.key)
    change = Change(replace(snapshot.profile, adapter=note, extra=extra), {}, {}, ())
    assert await writing.store.commit(user.key, snapshot.version, change)
    await writing.add(user, items("waves"), "")
    await writing.replace(user, items("bread"), "")
    profile = await writing.current(user)
    assert (profile.adapter, profile.extra) == (note, extra)


async def test_lost_item_embeddings_are_remade(writing: Profiles, valkey: ValkeyProcess, user: User) -> None:
    await writing.replace(user, items("waves", "roses"), "")
    async with redis.from_url(valkey.url) as raw:
        assert await raw.delete(f"mta:{{{user.key}}}:vectors") == 1
    writing.embedder.texts.clear()
    assert (await writing.replace(user, items("waves", "roses"), "")).changed == 0
    assert writing.embedder.texts == []
    after = await writing.add(user, items("chess"), "")
    assert (len(writing.embedder.texts), after.profile.items) == (3, 3)


async def test_a_writer_that_loses_a_race_does_not_embed_again(writing: Profiles, user: User) -> None:
    embedder = writing.embedder
    embedder.gate.clear()
    slow = asyncio.create_task(writing.add(user, items("waves"), ""))
    await embedder.asked()
    await profiles(writing.store, CountingEmbedder(embedder.inner)).add(user, items("roses"), "")
    embedder.gate.set()
    assert (await slow).profile.items == 2
    assert embedder.texts == ["a text about waves"]


async def test_a_long_history_is_embedded_in_batches(writing: Profiles, user: User) -> None:
    await writing.replace(user, items(*(f"n{number}" for number in range(3 * EMBED_BATCH))), "")
    assert (writing.embedder.largest_batch, len(writing.embedder.texts)) == (EMBED_BATCH, 3 * EMBED_BATCH)


async def test_gateways_of_two_embedders_keep_each_others_embeddings(
    store: ProfileStore, embedder: Embedder, valkey: ValkeyProcess, user: User
) -> None:
    old, new = CountingEmbedder(embedder), CountingEmbedder(embedder, "11" * 8)
    gateways = [profiles(store, each) for each in (old, new)]
    await gateways[0].replace(user, items("waves", "roses"), "")
    written_ms = (await gateways[0].current(user)).updated_ms
    assert [(await gateway.current(user)).embedder for gateway in gateways] == [old.id, new.id]
    async with redis.from_url(valkey.url) as raw:
        name = f"mta:{{{user.key}}}:profile"
        record = await raw.get(name)
        for each in (old, new):
            each.texts.clear()
        for gateway in gateways * 3:
            assert (await gateway.current(user)).updated_ms == written_ms
        assert await raw.get(name) == record
        assert old.texts == new.texts == []
    await gateways[1].add(user, items("bread"), "")
    for gateway, each in zip(gateways, (old, new), strict=True):
        profile = await gateway.current(user)
        assert (profile.embedder, profile.items, profile.updated_ms > written_ms) == (each.id, 3, True)
