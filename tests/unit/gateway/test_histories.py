"""The line of histories that are to be indexed: short, shared, one at a time, in turns over the callers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import get_task
from server.errors import Unavailable
from server.gateway.access.keys import Caller
from server.gateway.generation.prompts import MAX_QUEUED_BUILDS, HistoryIndexer, IndexCache, PromptBuilder, Version
from server.gateway.generation.request import LengthLimits
from server.gateway.routes.generate import request_of
from server.gateway.routes.requests import GenerateRequest
from server.store.profile_record import Profile, StoredItem
from server.store.tenants.user_key import User, UserKeys

KEYS = UserKeys("a secret that only tests know", "default")
REQUEST = request_of(
    GenerateRequest(user_id="ada", prompt="hello", history=1, max_tokens=4), KEYS, Caller("app", "default", frozenset())
)


class Held:
    """Histories that are read one by one, as the test lets them be."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.gate = asyncio.Semaphore(0)
        self.fails = False

    async def items(self, user: User) -> Mapping[str, StoredItem]:
        self.read.append(user.id)
        await self.gate.acquire()
        if self.fails:
            raise Unavailable("the store is down")
        return {}


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def indexing(held: Held) -> HistoryIndexer:
    return HistoryIndexer(held.items, get_task("chat"), IndexCache(1 << 20))


@pytest.fixture
def prompts(indexing: HistoryIndexer) -> PromptBuilder:
    return PromptBuilder(get_task("chat"), None, indexing, patience_s=0.4)  # nobody is asked to count tokens


def profile(user_id: str) -> Profile:
    return Profile(user_id, 1, 1, "embedder", np.zeros(4, np.float16))


def ask(indexing: HistoryIndexer, user_id: str, caller: str = "app", patience_s: float = 60) -> asyncio.Task[Any]:
    async def asking() -> Any:
        return (await indexing.index(KEYS.user(user_id), profile(user_id), caller, patience_s))[0]

    return asyncio.create_task(asking())


async def settled() -> None:
    """Return once all that can be done has been done."""
    for _ in range(10):
        await asyncio.sleep(0)


async def until_read(held: Held, count: int) -> None:
    async with asyncio.timeout(30):
        while len(held.read) < count:
            await asyncio.sleep(0.001)


async def test_callers_take_turns(indexing: HistoryIndexer, held: Held) -> None:
    asking = [ask(indexing, f"many-{n}", "one with many") for n in range(4)]
    await settled()
    asking += [ask(indexing, "few", "one with few")]
    await settled()
    for _ in asking:
        held.gate.release()
    assert None not in await asyncio.gather(*asking)
    assert held.read == ["many-0", "many-1", "few", "many-2", "many-3"]


async def test_a_caller_whose_line_is_full_goes_without_at_once_and_others_do_not(
    indexing: HistoryIndexer, held: Held
) -> None:
    busy = ask(indexing, "busy")
    await settled()
    waiting = [ask(indexing, f"user-{n}") for n in range(MAX_QUEUED_BUILDS)]
    await settled()
    assert await ask(indexing, "one too many") is None
    other = ask(indexing, "another's", "another")
    await settled()
    assert not other.done()
    for _ in range(2 + MAX_QUEUED_BUILDS):
        held.gate.release()
    assert None not in await asyncio.gather(busy, other, *waiting)


async def test_what_is_begun_at_once_needs_no_patience(indexing: HistoryIndexer, held: Held) -> None:
    first, second = ask(indexing, "first", patience_s=0), ask(indexing, "second", patience_s=0)
    assert await second is None
    held.gate.release()
    assert await first is not None


async def test_whoever_asks_for_the_same_history_shares_the_work_and_a_place_in_the_line(
    indexing: HistoryIndexer, held: Held
) -> None:
    busy = ask(indexing, "busy")
    asking = [ask(indexing, "ada") for _ in range(MAX_QUEUED_BUILDS + 5)]
    await settled()
    held.gate.release()
    held.gate.release()
    assert len({id(index) for index in await asyncio.gather(*asking)}) == 1
    assert await busy is not None
    assert held.read == ["busy", "ada"]


async def test_whoever_leaves_takes_no_work_along_and_makes_no_room_for_a_second_one(
    indexing: HistoryIndexer, held: Held
) -> None:
    leaving, other = ask(indexing, "ada"), ask(indexing, "bob")
    await until_read(held, 1)
    leaving.cancel()
    await settled()
    assert held.read == ["ada"]
    staying = ask(indexing, "ada")
    held.gate.release()
    assert await staying is not None
    await until_read(held, 2)
    held.gate.release()
    assert await other is not None


async def test_a_store_that_fails_is_told_to_who_waits_and_the_next_one_goes_on(
    indexing: HistoryIndexer, held: Held
) -> None:
    held.fails = True
    first, second = ask(indexing, "ada"), ask(indexing, "bob")
    held.gate.release()
    with pytest.raises(Unavailable):
        await first
    held.fails = False
    held.gate.release()
    assert await second is not None


async def test_only_one_history_is_indexed_at_a_time(
    indexing: HistoryIndexer, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, lock = 0, threading.Lock()

    class Slow:
        size_bytes = 1

        def __init__(self, *_: Any) -> None:
            nonlocal together
            together += not lock.acquire(blocking=False)
            threading.Event().wait(0.01)
            lock.release()

    monkeypatch.setattr("server.gateway.generation.prompts.ItemIndex", Slow)
    for _ in range(8):
        held.gate.release()
    await asyncio.gather(*(ask(indexing, f"user-{n}", f"app-{n}") for n in range(8)))
    assert together == 0


@pytest.mark.parametrize(("given_s", "left_s"), [(None, 0.2), (0.1, 0.05), (60, 0.2)])
async def test_half_of_a_requests_patience_is_left_for_a_place_when_its_history_is_not(
    indexing: HistoryIndexer, prompts: PromptBuilder, held: Held, given_s: float | None, left_s: float
) -> None:
    busy = ask(indexing, "busy")
    await until_read(held, 1)
    request = replace(REQUEST, patience_s=given_s)
    prompt = await prompts.build(request, profile("ada"), LengthLimits(1000, 512))
    assert (prompt.messages, prompt.items) == (REQUEST.messages, 0)
    assert prompt.reason
    assert prompt.patience_s is not None
    assert 0 <= prompt.patience_s < left_s + 0.01
    busy.cancel()


async def test_a_request_that_needs_no_history_keeps_its_patience(prompts: PromptBuilder) -> None:
    for given_s in (None, 0.1):
        request = replace(REQUEST, history=0, patience_s=given_s)
        assert (await prompts.build(request, profile("ada"), LengthLimits(1000, 512))).patience_s == given_s


ONE: Version = (1, 1, b"one")
OTHERS: list[Version] = [(2, 1, b"one"), (1, 2, b"one"), (1, 1, b"other")]


def small_index(words: int = 100) -> ItemIndex:
    said = " ".join(map(str, range(100, 100 + words)))
    return ItemIndex(get_task("chat"), [Item("a", {"input": "?", "output": said})])


async def test_what_was_put_is_found_in_the_same_version_alone() -> None:
    for other in OTHERS:
        cache, kept = IndexCache(1 << 20), small_index()
        cache.put("ada", ONE, kept)
        assert cache.get("ada", ONE) is kept
        assert cache.get("bob", ONE) is None
        assert cache.get("ada", other) is None
        assert cache.size_bytes == 0  # what is out of date is not kept


async def test_it_never_takes_more_than_its_bytes_and_the_least_recently_used_goes_first() -> None:
    cache = IndexCache(3 * small_index().size_bytes)
    for name in ("ada", "bob", "cyd"):
        cache.put(name, ONE, small_index())
    assert cache.get("ada", ONE)
    cache.put("dan", ONE, small_index())
    assert [name for name in ("ada", "bob", "cyd", "dan") if cache.get(name, ONE)] == ["ada", "cyd", "dan"]
    assert cache.size_bytes == 3 * small_index().size_bytes
    cache.put("ada", ONE, small_index(1000))
    assert cache.get("ada", ONE) is None
    assert cache.size_bytes == 2 * small_index().size_bytes


async def test_an_index_goes_some_time_after_its_last_use() -> None:
    cache = IndexCache(1 << 20, ttl_s=0.01)
    cache.put("ada", ONE, small_index())
    async with asyncio.timeout(10):
        while cache.size_bytes:
            await asyncio.sleep(0.01)
    assert cache.get("ada", ONE) is None


@pytest.mark.parametrize("words", [0, 10, 1000, 20_000])
def test_a_size_tells_about_how_much_memory_an_index_takes(words: int) -> None:
    text_bytes = len(" ".join(map(str, range(100, 100 + words))))
    assert text_bytes < small_index(words).size_bytes < 1000 + 60 * text_bytes
