"""How histories change, the queue of histories to index, and the cache of indexes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import get_task
from server.errors import Unavailable
from server.gateway.generation.prompts import MAX_QUEUED_BUILDS, HistoryIndexer, IndexCache, PromptBuilder
from server.gateway.generation.request import LengthLimits
from server.gateway.routes.generate import request_of
from server.gateway.routes.requests import GenerateRequest
from server.gateway.users.histories import HistoryLimit, add_to_history, diff_histories, replace_history
from server.store.profile_record import Profile, StoredItem
from server.store.tenants.user_key import User, UserKeys
from tests.support.gateway import call_by
from tests.support.watchdog import settled

LIMIT = HistoryLimit(5, 100)
ITEMS = st.lists(st.builds(lambda name, text: Item(name, {"text": text}), st.sampled_from("abcdefghij"), st.text()))
CHANGES = st.sampled_from((replace_history, add_to_history))


def grow(batches: list[Any]) -> dict[str, StoredItem]:
    history: dict[str, StoredItem] = {}
    for change, items in batches:
        history = change(history, items, LIMIT)
    return history


HISTORIES = st.lists(st.tuples(CHANGES, ITEMS.filter(bool)), min_size=1, max_size=6).map(grow)


def last_of_each(items: list[Item]) -> dict[str, Item]:
    return {item.id: item for item in items}


def in_last_places(items: list[Item]) -> list[tuple[str, Any]]:
    ids = list(dict.fromkeys(item.id for item in reversed(items)))[::-1]
    return [(name, last_of_each(items)[name].fields) for name in ids]


@given(HISTORIES, ITEMS.filter(bool), CHANGES)
def test_repeating_a_change_changes_nothing(history: dict[str, StoredItem], items: list[Item], change: object) -> None:
    once = change(history, items, LIMIT)
    twice = change(once, items, LIMIT)
    step = diff_histories(once, twice)
    assert (step.put, step.drop, step.changed) == ({}, (), 0)
    assert list(once) == list(twice)
    orders = [item.order for item in once.values()]
    assert orders == sorted(set(orders))


def newest(contents: list[tuple[str, Any]]) -> dict[str, Any]:
    """The last ones that are within the limit together, by the plainest way there is."""
    for start in range(len(contents) + 1):
        kept = contents[start:]
        if len(kept) <= LIMIT.items and sum(len(orjson.dumps(fields)) for _, fields in kept) <= LIMIT.size_bytes:
            return dict(kept)
    raise AssertionError


@given(HISTORIES, ITEMS)
def test_adding_keeps_the_given_items_then_the_newest_others(history: dict[str, StoredItem], items: list[Item]) -> None:
    after = add_to_history(history, items, LIMIT)
    untouched = [(name, item.fields) for name, item in history.items() if name not in last_of_each(items)]
    assert {name: item.fields for name, item in after.items()} == newest(untouched + in_last_places(items))


@given(HISTORIES, ITEMS)
def test_replacing_keeps_the_newest_given_in_their_order(history: dict[str, StoredItem], items: list[Item]) -> None:
    after = replace_history(history, items, LIMIT)
    expected = newest(in_last_places(items))
    assert [(name, item.fields) for name, item in after.items()] == list(expected.items())


def test_older_item_is_dropped_where_a_newer_has_no_room() -> None:
    history = add_to_history({}, [Item("small", {"text": "x"})], LIMIT)
    after = add_to_history(history, [Item("large", {"text": "x" * 60}), Item("larger", {"text": "x" * 70})], LIMIT)
    assert list(after) == ["larger"]


@given(HISTORIES, HISTORIES)
def test_a_diff_turns_one_history_into_the_other(before: dict[str, StoredItem], after: dict[str, StoredItem]) -> None:
    step = diff_histories(before, after)
    result = {name: item for name, item in before.items() if name not in step.drop} | step.put
    assert result == after
    content = {name: item.fields for name, item in before.items()}, {name: item.fields for name, item in after.items()}
    assert step.changed == sum(content[0].get(name) != fields for name, fields in content[1].items())


def test_new_content_under_a_known_id_replaces_it_in_its_place() -> None:
    history = add_to_history({}, [Item("a", {"text": "1"}), Item("b", {"text": "2"})], LIMIT)
    after = add_to_history(history, [Item("a", {"text": "new"})], LIMIT)
    assert [(name, item.fields["text"]) for name, item in after.items()] == [("a", "new"), ("b", "2")]


KEYS = UserKeys("a secret that only tests know", "default")
ASKED = GenerateRequest(user_id="ada", prompt="hello", history=1, max_tokens=4)
REQUEST = request_of(call_by("app"), ASKED, ASKED.turns, learn=False, patience_s=None)


class Held:
    """Histories; the test lets them be read one by one."""

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


def profile(user_id: str) -> Profile:
    return Profile(user_id, 1, 1, "embedder", np.zeros(4, np.float16))


def ask(indexing: HistoryIndexer, user_id: str, caller: str = "app", patience_s: float = 60) -> asyncio.Task[Any]:
    async def asking() -> Any:
        return (await indexing.index(KEYS.user(user_id), profile(user_id), caller, patience_s))[0]

    return asyncio.create_task(asking())


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


async def test_only_a_caller_with_a_full_line_goes_without_at_once(indexing: HistoryIndexer, held: Held) -> None:
    busy = ask(indexing, "busy", patience_s=0)  # begun at once, it needs no patience
    assert await ask(indexing, "impatient", patience_s=0) is None  # but its build stays in line
    waiting = [ask(indexing, f"user-{n}") for n in range(MAX_QUEUED_BUILDS - 1)]
    await settled()
    assert await ask(indexing, "one too many") is None
    other = ask(indexing, "another's", "another")
    await settled()
    assert not other.done()
    for _ in range(2 + MAX_QUEUED_BUILDS):
        held.gate.release()
    assert None not in await asyncio.gather(busy, other, *waiting)


async def test_requests_for_the_same_history_share_one_build(indexing: HistoryIndexer, held: Held) -> None:
    busy = ask(indexing, "busy")
    asking = [ask(indexing, "ada") for _ in range(MAX_QUEUED_BUILDS + 5)]
    await settled()
    held.gate.release()
    held.gate.release()
    assert len({id(index) for index in await asyncio.gather(*asking)}) == 1
    assert await busy is not None
    assert held.read == ["busy", "ada"]


async def test_a_build_goes_on_without_the_request_that_began_it(indexing: HistoryIndexer, held: Held) -> None:
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


async def test_a_failed_read_is_reported_and_the_next_build_goes_on(indexing: HistoryIndexer, held: Held) -> None:
    held.fails = True
    first, second = ask(indexing, "ada"), ask(indexing, "bob")
    held.gate.release()
    with pytest.raises(Unavailable):
        await first
    held.fails = False
    held.gate.release()
    assert await second is not None


async def test_builds_do_not_overlap(indexing: HistoryIndexer, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
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
async def test_half_of_the_patience_is_left_if_history_is_late(
    indexing: HistoryIndexer, held: Held, given_s: float | None, left_s: float
) -> None:
    prompts = PromptBuilder(get_task("chat"), None, indexing, patience_s=0.4)  # nobody is asked to count tokens
    busy = ask(indexing, "busy")
    await until_read(held, 1)
    request = replace(REQUEST, patience_s=given_s)
    limits, ada = LengthLimits(1000, 512, 300), (REQUEST.user, profile("ada"))
    prompt = await prompts.build(request, *ada, limits)
    assert (prompt.messages, prompt.items) == (REQUEST.messages, 0)
    assert prompt.reason
    assert prompt.patience_s is not None
    assert 0 <= prompt.patience_s < left_s + 0.01
    without = await prompts.build(
        replace(request, history=0), REQUEST.user, profile("ada"), LengthLimits(1000, 512, 300)
    )
    assert without.patience_s == given_s
    busy.cancel()


ONE = (1, 1, b"one")


def small_index(words: int = 100) -> ItemIndex:
    said = " ".join(map(str, range(100, 100 + words)))
    return ItemIndex(get_task("chat"), [Item("a", {"input": "?", "output": said})])


async def test_what_was_put_is_found_in_the_same_version_alone() -> None:
    for other in ((2, 1, b"one"), (1, 2, b"one"), (1, 1, b"other")):
        cache, kept = IndexCache(1 << 20), small_index()
        cache.put("ada", ONE, kept)
        assert cache.get("ada", ONE) is kept
        assert cache.get("bob", ONE) is None
        assert cache.get("ada", other) is None
        assert cache.size_bytes == 0  # what is out of date is not kept


async def test_cache_keeps_to_its_bytes_and_evicts_least_recent() -> None:
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
