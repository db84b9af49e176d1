"""An answer that goes to the engines in parts, and comes back as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
import pytest

from server.errors import EngineFailed
from server.gateway.access.queue import EngineQueue
from server.gateway.engines.chat import EngineRequest, EngineStream
from server.gateway.generation.answer_stream import AnswerStream, split_request
from server.gateway.routes.openai.routes import join_chunks


def request(prompt: Any = None, **sampling: Any) -> EngineRequest:
    return EngineRequest("id", "base", [], sampling, "messages", "salt", prompt=prompt)


class Engine:
    """Says what the test lets it say."""

    def __init__(self) -> None:
        self.said: dict[str, asyncio.Queue[bytes]] = {}
        self.left: list[str] = []

    def say(self, name: str, *values: dict[str, Any] | bytes) -> None:
        """The next chunks of a request."""
        for value in values:
            data = value if isinstance(value, bytes) else b"data: " + orjson.dumps(value) + b"\n\n"
            self.said[name].put_nowait(data)

    @asynccontextmanager
    async def begin(self, wanted: EngineRequest) -> AsyncIterator[tuple[int, EngineStream]]:
        said = self.said[wanted.request_id] = asyncio.Queue()

        class Chunks:
            async def iter_any(self) -> AsyncIterator[bytes]:
                while True:
                    yield await said.get()

            async def read(self) -> bytes:
                return await said.get()

        try:
            yield 0, EngineStream(Chunks(), 0.0, chat=False)
        finally:
            self.left.append(wanted.request_id)


def piece(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    return {"created": 1, "choices": [{"index": index, "text": text, "finish_reason": reason}]}


def end(prompt: int, completion: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"created": 2, "choices": [], "usage": usage}


DONE = b"data: [DONE]\n\n"


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def queue() -> EngineQueue:
    return EngineQueue(lambda: 4, max_waiting=4, patience_s=60)


@asynccontextmanager
async def answering(
    engine: Engine, queue: EngineQueue, wanted: EngineRequest, most: int
) -> AsyncIterator[AnswerStream]:
    """An answer whose first part has begun, with an empty piece."""
    parts = split_request(wanted, most)
    async with queue.acquire("a", size=parts[0].sequences) as lease, engine.begin(parts[0].request) as (_, first):
        engine.say("id", piece(0, ""))
        await first.begin()
        wait = partial(queue.acquire, "a", begun=True)
        async with AnswerStream(parts, first, lease, lambda size: wait(size=size), engine.begin) as stream:
            yield stream


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class TestParts:
    """How a request is parted."""

    def test_what_is_narrow_enough_stays_whole(self) -> None:
        wanted = request(n=4, seed=1)
        assert [part.request for part in split_request(wanted, 4)] == [wanted]
        assert [part.request for part in split_request(wanted, None)] == [wanted]

    def test_seeds_go_on_as_the_engine_s_do(self) -> None:
        parts = split_request(request(n=7, seed=(1 << 63) - 4), 3)
        assert [(part.request.sampling["n"], part.first) for part in parts] == [(3, 0), (3, 3), (1, 6)]
        assert [part.request.sampling["seed"] for part in parts] == [(1 << 63) - 4, (1 << 63) - 1, -(1 << 63) + 2]
        assert [part.counts_prompt for part in parts] == [True, False, False]
        assert len({part.request.request_id for part in parts}) == 3

    def test_several_prompts(self) -> None:
        parts = split_request(request(["a", "b", "c"], n=2), 4)
        assert [(part.request.prompt, part.first, part.sequences) for part in parts] == [
            (["a", "b"], 0, 4),
            (["c"], 4, 2),
        ]
        parts = split_request(request([[1, 2], [3]], n=3), 2)
        assert [(part.request.prompt, part.request.sampling["n"], part.first) for part in parts] == [
            ([1, 2], 2, 0),
            ([1, 2], 1, 2),
            ([3], 2, 3),
            ([3], 1, 5),
        ]
        assert [part.counts_prompt for part in parts] == [True, False, True, False]

    def test_what_the_engine_refuses_is_refused_in_parts_too(self) -> None:
        (part,) = split_request(request(n=9, temperature=0), 1)
        assert (part.request.sampling["n"], part.sequences) == (9, 1)


async def test_every_sequence_gives_its_place_back_when_it_ends(engine: Engine, queue: EngineQueue) -> None:
    async with answering(engine, queue, request(n=3), 4) as stream:
        assert queue.taken == 3
        pieces = stream.pieces()
        engine.say("id", piece(1, "b", "stop"), piece(0, "a"), piece(2, "c", "length"))
        await anext(pieces)
        for left in (2, 2, 1):
            await anext(pieces)
            assert queue.taken == left
        engine.say("id", piece(0, "", "stop"), end(5, 4), DONE)
        assert len([one async for one in pieces]) == 2
        assert (queue.taken, stream.usage["total_tokens"]) == (0, 9)


async def test_parts_wait_one_after_another_and_come_back_as_one(engine: Engine, queue: EngineQueue) -> None:
    async with answering(engine, queue, request(n=6), 2) as stream:
        await settled()
        assert (list(engine.said), queue.taken, queue.waiting) == (["id", "id-1"], 4, 1)
        engine.say("id", piece(1, "b", "stop"))
        engine.say("id-1", piece(1, "d", "stop"), piece(0, "c", "stop"), end(5, 2), DONE)
        await settled()
        assert list(engine.said) == ["id", "id-1", "id-2"]
        engine.say("id", piece(0, "a", "stop"), end(5, 2), DONE)
        engine.say("id-2", piece(0, "e", "stop"), piece(1, "f", "stop"), end(5, 3), DONE)
        values = [value async for _, value in stream.pieces()]
        whole = join_chunks(values, "text_completion")
        assert [choice["text"] for choice in whole["choices"]] == list("abcdef")
        assert [choice["index"] for choice in whole["choices"]] == list(range(6))
        assert values[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        assert {value["created"] for value in values} == {1}
    assert (queue.taken, queue.waiting) == (0, 0)


async def test_a_part_that_fails_ends_all(engine: Engine, queue: EngineQueue) -> None:
    with pytest.raises(EngineFailed):
        async with answering(engine, queue, request(n=6), 2) as stream:
            await settled()
            engine.say("id-1", b"data: nonsense\n\n")
            async for _ in stream.pieces():
                pass
    assert sorted(engine.left) == ["id", "id-1"]
    assert (queue.taken, queue.waiting) == (0, 0)


async def test_who_leaves_takes_all_parts_along(engine: Engine, queue: EngineQueue) -> None:
    async with answering(engine, queue, request(n=8), 2):
        await settled()
        assert (queue.taken, queue.waiting) == (4, 1)
    assert sorted(engine.left) == ["id", "id-1"]
    assert (queue.taken, queue.waiting) == (0, 0)


def test_a_conversation_s_chunks_become_the_message_that_the_engine_would_have_sent() -> None:
    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, said: str = "") -> dict[str, Any]:
        logprobs = {"content": [{"token": said, "logprob": -1.0}]} if said else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {"id": "x", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}

    chunks = [
        chunk(1, {"role": "assistant", "content": ""}),
        chunk(0, {"role": "assistant", "content": ""}),
        chunk(1, {"content": "b"}, said="b"),
        chunk(0, {"reasoning": "so"}),
        chunk(0, {"content": "a "}, said="a"),
        chunk(0, {"content": "c"}, "length", "c") | {"system_fingerprint": "f"},
        chunk(1, {}, "stop"),
        {"choices": [], "usage": {"total_tokens": 3}},
    ]
    value = join_chunks(chunks, "chat.completion")
    assert (value["object"], value["id"], value["usage"]) == ("chat.completion", "x", {"total_tokens": 3})
    first, second = value["choices"]
    assert first["message"] == {"role": "assistant", "content": "a c", "refusal": None, "reasoning": "so"}
    assert [one["token"] for one in first["logprobs"]["content"]] == ["a", "c"]
    assert (first["finish_reason"], second["finish_reason"]) == ("length", "stop")
    assert second["message"]["content"] == "b"
