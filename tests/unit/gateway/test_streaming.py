"""Server-sent events: read however the network cuts them, and sent so that no silence lasts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.engines.chat import events
from server.gateway.http.streaming import DONE, KEEP_ALIVE, EventSender, event


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


async def test_a_sender_begins_once_and_says_nothing_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.gateway.http.streaming.KEEP_ALIVE_S", 0.001)
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        await asyncio.sleep(0.003)  # a client that reads slowly: comments and events meet
        sent.append(message)

    async with EventSender(send, lambda: {"Server-Timing": "x"}) as sender:
        await asyncio.sleep(0.01)
        for number in range(5):
            await sender.write(event(number))
        await sender.end()
        await asyncio.sleep(0.01)
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    bodies = [message["body"] for message in sent[1:-1]]
    assert [body for body in bodies if body != KEEP_ALIVE] == [event(number) for number in range(5)]
    assert bodies[0] == KEEP_ALIVE
    head = dict(sent[0]["headers"])
    assert head[b"server-timing"] == b"x"
    assert b"content-length" not in head


def test_a_stream_without_its_end_is_noticed() -> None:
    with pytest.raises(EOFError):
        read(event(1))


def test_an_event_that_is_no_json_is_noticed() -> None:
    with pytest.raises(ValueError, match="unexpected"):
        read(b"data: {oops\n\n")
