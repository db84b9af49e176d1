"""Reading server-sent events, however the network cuts them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.streaming import DONE, event, events


class Pieces:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


def read(*pieces: bytes) -> list[object]:
    async def collect() -> list[object]:
        return [value async for value in events(Pieces(list(pieces)))]

    return asyncio.run(collect())


VALUES = st.lists(st.dictionaries(st.text(), st.text() | st.integers(-9, 9)), max_size=5)


@given(VALUES, st.lists(st.integers(0, 400), max_size=8))
def test_events_do_not_depend_on_where_the_bytes_were_cut(values: list[object], cuts: list[int]) -> None:
    whole = b"".join(map(event, values)) + DONE
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    assert read(*(whole[a:b] for a, b in itertools.pairwise(places))) == values


def test_comments_other_fields_and_carriage_returns_are_passed_over() -> None:
    assert read(b': ping\r\nid: 3\r\ndata: {"a": 1}\r\n\r\n', DONE) == [{"a": 1}]


def test_nothing_is_read_after_the_end() -> None:
    assert read(event(1) + DONE + b"data: no json\n\n") == [1]


def test_a_stream_without_its_end_is_noticed() -> None:
    with pytest.raises(EOFError):
        read(event(1))


def test_an_event_that_is_no_json_is_noticed() -> None:
    with pytest.raises(ValueError, match="unexpected"):
        read(b"data: {oops\n\n")
