"""Indexes of histories in a gateway's memory: bounded, and gone after a while."""

from __future__ import annotations

import asyncio

import pytest

from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import get_task
from server.gateway.generation.histories import IndexCache, Version

ONE: Version = (1, 1, b"one")
OTHERS: list[Version] = [(2, 1, b"one"), (1, 2, b"one"), (1, 1, b"other")]


def index(words: int = 100) -> ItemIndex:
    return ItemIndex(
        get_task("chat"), [Item("a", {"input": "?", "output": " ".join(map(str, range(100, 100 + words)))})]
    )


async def test_what_was_put_is_found_in_the_same_version_alone() -> None:
    for other in OTHERS:
        cache, kept = IndexCache(1 << 20), index()
        cache.put("ada", ONE, kept)
        assert cache.get("ada", ONE) is kept
        assert cache.get("bob", ONE) is None
        assert cache.get("ada", other) is None
        assert cache.size_bytes == 0  # what is out of date is not kept


async def test_it_never_takes_more_than_its_bytes_and_the_least_recently_used_goes_first() -> None:
    cache = IndexCache(3 * index().size_bytes)
    for name in ("ada", "bob", "cyd"):
        cache.put(name, ONE, index())
    assert cache.get("ada", ONE)
    cache.put("dan", ONE, index())
    assert [name for name in ("ada", "bob", "cyd", "dan") if cache.get(name, ONE)] == ["ada", "cyd", "dan"]
    assert cache.size_bytes == 3 * index().size_bytes
    cache.put("ada", ONE, index(1000))
    assert cache.get("ada", ONE) is None
    assert cache.size_bytes == 2 * index().size_bytes


async def test_an_index_goes_some_time_after_its_last_use() -> None:
    cache = IndexCache(1 << 20, kept_s=0.01)
    cache.put("ada", ONE, index())
    async with asyncio.timeout(10):
        while cache.size_bytes:
            await asyncio.sleep(0.01)
    assert cache.get("ada", ONE) is None


@pytest.mark.parametrize("words", [0, 10, 1000, 20_000])
def test_a_size_tells_about_how_much_memory_an_index_takes(words: int) -> None:
    text_bytes = len(" ".join(map(str, range(100, 100 + words))))
    assert text_bytes < index(words).size_bytes < 1000 + 60 * text_bytes
