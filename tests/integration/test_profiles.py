"""The write side of profiles on a real store: what is embedded, when, and with which embedder."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis.asyncio as redis

from bank.items.profile import Item, Vectors
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bench.rig.valkey import ValkeyProcess, free_port
from server.gateway.users.profiles import EMBED_BATCH, HistoryLimit, Profiles
from server.store.profile_record import AdapterNote
from server.store.profiles import Change, ProfileStore
from server.store.queue import UserQueue
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.user_key import User, UserKeys
from tests.support.stored import opened

KEYS = UserKeys("a secret for tests only", "profiles")
OLD = "00" * 8

_numbers = itertools.count()


class CountingEmbedder:
    """The real embedder, counting; `id` can be given to pass for another one."""

    def __init__(self, inner: Embedder, identity: str | None = None) -> None:
        self._inner = inner
        self.id = identity or inner.id
        self.texts: list[str] = []
        self.largest_batch = 0
        self.gate = threading.Event()
        self.gate.set()

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.gate.wait(30)
        self.texts += texts
        self.largest_batch = max(self.largest_batch, len(texts))
        return self._inner.embed(texts)


@pytest.fixture(scope="module")
def inner(embedder_folder: Path) -> Embedder:
    return Embedder.load(embedder_folder)


@pytest.fixture
def embedder(inner: Embedder) -> CountingEmbedder:
    return CountingEmbedder(inner)


@pytest.fixture
async def store(valkey: ValkeyProcess) -> AsyncIterator[ProfileStore]:
    async with opened(valkey.url) as store:
        yield store


@pytest.fixture
def writing(store: ProfileStore, embedder: CountingEmbedder) -> Profiles:
    return profiles(store, embedder)


@pytest.fixture
def user() -> User:
    return KEYS.user(f"user-{next(_numbers)}")


def profiles(store: ProfileStore, embedder: CountingEmbedder, signing: UserQueue | None = None) -> Profiles:
    executor, limit = ThreadPoolExecutor(1), HistoryLimit(64, 1 << 20)
    return Profiles(store, embedder, get_task("chat"), executor, limit, signing)


def items(*names: str) -> list[Item]:
    return [Item(name, {"text": f"a text about {name}"}) for name in names]


async def test_only_what_is_new_is_embedded(writing: Profiles, embedder: CountingEmbedder, user: User) -> None:
    await writing.replace(user, items("waves", "roses", "chess"), "")
    embedder.texts.clear()
    await writing.replace(user, items("waves", "roses", "chess"), "")
    await writing.replace(user, items("chess", "waves"), "")
    assert embedder.texts == []
    await writing.add(user, items("bread"), "")
    assert embedder.texts == ["a text about bread"]
    await writing.add(user, [Item("bread", {"text": "another text"})], "")
    assert embedder.texts == ["a text about bread", "another text"]


async def test_a_write_stands_though_the_queue_for_signatures_is_away(
    store: ProfileStore, embedder: CountingEmbedder, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    """In a cluster, it is on another server."""
    nobody = RedisConnection(f"redis://127.0.0.1:{free_port()}", require_durable=False)
    writing = profiles(store, embedder, UserQueue(nobody, "sign", "9f2c41d0"))
    assert (await writing.replace(user, items("waves"), "")).changed == 1
    assert "a signature could not be requested" in caplog.text
    await nobody.close()


async def test_the_embedding_is_the_unit_mean_of_the_items(
    store: ProfileStore, embedder: CountingEmbedder, inner: Embedder, user: User
) -> None:
    await profiles(store, embedder).replace(user, items("waves", "roses"), "")
    profile = await profiles(store, embedder).current(user)
    mean = inner.embed(["a text about waves", "a text about roses"]).mean(axis=0)
    assert profile is not None
    assert float(profile.embedding @ mean / np.linalg.norm(mean)) == pytest.approx(1, abs=1e-3)


async def test_an_embedding_of_another_embedder_is_remade_on_first_use(
    store: ProfileStore, inner: Embedder, user: User
) -> None:
    old, new = CountingEmbedder(inner, OLD), CountingEmbedder(inner)
    await profiles(store, old).replace(user, items("waves", "roses"), "")
    reading = profiles(store, new)
    profile = await reading.current(user)
    assert profile is not None
    assert profile.embedder == inner.id
    assert sorted(new.texts) == ["a text about roses", "a text about waves"]
    await reading.current(user)
    assert len(new.texts) == 2  # it was kept
    other = KEYS.user(f"user-{next(_numbers)}")
    await profiles(store, old).replace(other, items("waves", "roses"), "")
    assert (await reading.add(other, items("chess"), "")).changed == 1
    assert len(new.texts) == 2 + 3
    assert {vector.embedder for vector in (await store.read(other.key)).vectors.values()} == {inner.id}


async def test_requests_that_come_while_an_embedding_is_remade_share_the_work(
    store: ProfileStore, inner: Embedder, user: User
) -> None:
    await profiles(store, CountingEmbedder(inner, OLD)).replace(user, items("waves", "roses"), "")
    new = CountingEmbedder(inner)
    new.gate.clear()
    reading = profiles(store, new)
    waiting = [asyncio.create_task(reading.current(user)) for _ in range(10)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()  # one of them leaving does not harm the others
    new.gate.set()
    assert {profile.embedder for profile in await asyncio.gather(*waiting[1:]) if profile} == {inner.id}
    assert len(new.texts) == 2


async def test_what_is_kept_beside_the_items_survives_their_changes(
    store: ProfileStore, writing: Profiles, user: User
) -> None:
    kept = {
        "adapter": AdapterNote("a" * 26, "mta3:9f2c41d0:shared:c", 27_000, 1),
        "extra": {200: b"of a later version" * 80},
    }
    await writing.add(user, items("surf"), "")
    snapshot = await store.read(user.key)
    assert snapshot.profile is not None
    change = Change(replace(snapshot.profile, **kept), {}, {}, ())
    assert await store.commit(user.key, snapshot.version, change)
    await writing.add(user, items("waves"), "")
    await writing.replace(user, items("bread"), "")
    profile = await writing.current(user)
    assert profile is not None
    assert {name: getattr(profile, name) for name in kept} == kept


async def test_lost_item_embeddings_are_remade_when_they_are_needed(
    writing: Profiles, embedder: CountingEmbedder, valkey: ValkeyProcess, user: User
) -> None:
    before = await writing.replace(user, items("waves", "roses"), "")
    async with redis.from_url(valkey.url) as raw:
        assert await raw.delete(f"mta:{{{user.key}}}:vectors") == 1
    embedder.texts.clear()
    assert (await writing.replace(user, items("waves", "roses"), "")).changed == 0
    assert embedder.texts == []
    after = await writing.add(user, items("chess"), "")
    assert len(embedder.texts) == 3
    assert after.profile.items == before.profile.items + 1


async def test_a_writer_that_loses_a_race_does_not_embed_again(
    store: ProfileStore, writing: Profiles, embedder: CountingEmbedder, user: User
) -> None:
    embedder.gate.clear()
    slow = asyncio.create_task(writing.add(user, items("waves"), ""))
    await asyncio.sleep(0.05)
    other = CountingEmbedder(embedder._inner)
    await profiles(store, other).add(user, items("roses"), "")
    embedder.gate.set()
    assert (await slow).profile.items == 2
    assert embedder.texts == ["a text about waves"]


async def test_a_long_history_is_embedded_in_short_turns(
    store: ProfileStore, embedder: CountingEmbedder, user: User
) -> None:
    names = [f"n{number}" for number in range(3 * EMBED_BATCH)]
    await profiles(store, embedder).replace(user, items(*names), "")
    assert embedder.largest_batch <= EMBED_BATCH
    assert len(embedder.texts) == len(names)


async def test_gateways_of_two_embedders_leave_each_others_embeddings_alone(
    store: ProfileStore, inner: Embedder, valkey: ValkeyProcess, user: User
) -> None:
    old, new = CountingEmbedder(inner), CountingEmbedder(inner, "11" * 8)
    gateways = [profiles(store, embedder) for embedder in (old, new)]
    await gateways[0].replace(user, items("waves", "roses"), "")
    signed_at = (await gateways[0].current(user)).updated_ms  # type: ignore[union-attr]
    seen = [await gateway.current(user) for gateway in gateways]
    assert [profile and profile.embedder for profile in seen] == [old.id, new.id]
    async with redis.from_url(valkey.url) as raw:
        name = f"mta:{{{user.key}}}:profile"
        record = await raw.get(name)
        for embedder in (old, new):
            embedder.texts.clear()
        for gateway in gateways * 3:
            profile = await gateway.current(user)
            assert profile is not None
            assert profile.updated_ms == signed_at
        assert await raw.get(name) == record
        assert old.texts == new.texts == []
    await gateways[1].add(user, items("bread"), "")
    for gateway, embedder in zip(gateways, (old, new), strict=True):
        profile = await gateway.current(user)
        assert profile is not None
        assert (profile.embedder, profile.items) == (embedder.id, 3)
        assert profile.updated_ms > signed_at
