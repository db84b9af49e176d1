"""Streams: events read and sent; an answer that goes to the engines in parts and comes back as one."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc
from collections.abc import AsyncIterator, Iterable, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank.lookup.phrases import TrustedPhrases, phrase_table
from server.errors import EngineFailed, InvalidRequest
from server.gateway.access.queue import EngineQueue
from server.gateway.engines.chat import EngineRequest, EngineStream, Piece, events
from server.gateway.experiments.arms import Level
from server.gateway.generation.answer_stream import AnswerStream, split_request
from server.gateway.generation.personalizer import Personalization
from server.gateway.generation.prompts import UserPrompt
from server.gateway.http.streaming import DONE, KEEP_ALIVE, EventSender, event
from server.gateway.routes.jobs import _JobEvents
from server.gateway.routes.openai import routes
from server.gateway.routes.openai.requests import ChatMessage, ChatRequest
from server.gateway.routes.openai.routes import JoinedChunks, OpenAIResponse
from server.store.jobs import Job, JobId, JobState
from tests.support.watchdog import settled


def request(prompt: Any = None, **sampling: Any) -> EngineRequest:
    return EngineRequest("id", "base", [], sampling, "messages", "salt", prompt=prompt)


class Engine:
    """Sends what the test lets it send."""

    def __init__(self) -> None:
        self.said: dict[str, asyncio.Queue[bytes]] = {}
        self.left: list[str] = []

    def say(self, name: str, *values: dict[str, Any] | bytes) -> None:
        for value in values:
            self.said[name].put_nowait(value if isinstance(value, bytes) else event(value))

    async def begin(self, stack: AsyncExitStack, wanted: EngineRequest) -> tuple[int, EngineStream]:
        said = self.said[wanted.request_id] = asyncio.Queue()

        class Chunks:
            async def iter_any(self) -> AsyncIterator[bytes]:
                while True:
                    yield await said.get()

        stack.callback(self.left.append, wanted.request_id)
        return 0, EngineStream(Chunks(), 0.0, replace(wanted, prompt="x"))


async def test_usage_is_the_sum_of_chunks_until_the_end() -> None:
    told = [(0, 5, 1), (1, 5, 1), (2, 7, 1), (0, 5, 2), (3, 7, 9)]  # answer, its prompt's tokens, its own
    usages = [{"prompt_tokens": prompt, "completion_tokens": own, "total_tokens": 0} for _, prompt, own in told]
    values = [piece(index, "x") | {"usage": usage} for (index, *_), usage in zip(told, usages, strict=True)]

    class Chunks:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for value in [*values, {"choices": [], "usage": usages[-1] | {"completion_tokens": 15}}]:
                yield event(value)

    stream: Any = EngineStream(Chunks(), 0.0, request("x", n=2))  # type: ignore[arg-type]
    counted = [tuple(stream.usage.values()) for _ in range(len(told) + 1) if await stream._next()]
    assert counted == [(5, 1, 6), (5, 2, 7), (12, 3, 15), (12, 4, 16), (12, 13, 25), (7, 15, 22)]


async def test_each_choice_is_read_from_its_own_beginning() -> None:
    said = [(0, [1]), (1, [1]), (1, [9]), (0, [2]), (1, None)]
    values = [{"choices": [{"index": index, "text": "", "token_ids": ids}]} for index, ids in said]

    class Chunks:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for value in values:
                yield event(value)

    phrases = TrustedPhrases(phrase_table([[1, 2], [1, 2]]), ())
    asked = replace(request("x", n=2), phrases=phrases)
    stream: Any = EngineStream(Chunks(), 0.0, asked)  # type: ignore[arg-type]
    choices = [(await stream._next())[1]["choices"][0] for _ in said]
    assert [choice.get("moved") for choice in choices] == [1, 1, 0, 1, None]
    assert (stream.moved, [choice for choice in choices if "token_ids" in choice]) == (3, [])


def piece(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    return {"created": 1, "choices": [{"index": index, "text": text, "finish_reason": reason}]}


def joined(chunks: Iterable[dict[str, Any]]) -> Any:
    """What is sent for all chunks of a stream."""
    whole = JoinedChunks()
    for chunk in chunks:
        whole.add(chunk)
    return orjson.loads(orjson.dumps(whole.value()))


def end(prompt: int, completion: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"created": 2, "choices": [], "usage": usage}


@asynccontextmanager
async def answer(n: int, most: int) -> AsyncIterator[tuple[Engine, EngineQueue, AnswerStream]]:
    """An answer whose first part has begun, with an empty piece."""
    engine, queue = Engine(), EngineQueue(lambda: 4, max_waiting=4, patience_s=60)
    parts = split_request(request(n=n), most)
    async with queue.acquire("a", size=parts[0].sequences) as lease, AsyncExitStack() as stack:
        _, first = await engine.begin(stack, parts[0].request)
        engine.say("id", piece(0, ""))
        await first.begin()
        wait = partial(queue.acquire, "a", begun=True)
        async with AnswerStream(parts, first, lease, lambda size: wait(size=size), engine.begin) as stream:
            yield engine, queue, stream


def test_a_request_is_split_into_parts() -> None:
    def split(wanted: EngineRequest, most: int | None) -> list[tuple[Any, ...]]:
        """Prompt, answers, index of the first choice and sequences of each part, and whether its prompt counts."""
        return [
            (part.request.prompt, part.request.sampling["n"], part.first, part.sequences, part.counts_prompt)
            for part in split_request(wanted, most)
        ]

    wanted = request(n=4, seed=1)
    for most in (4, None):
        assert [part.request for part in split_request(wanted, most)] == [wanted]
    assert split(request(n=7), 3) == [(None, 3, 0, 3, True), (None, 3, 3, 3, False), (None, 1, 6, 1, False)]
    assert split(request(["a", "b", "c"], n=2), 4) == [(["a", "b"], 2, 0, 4, True), (["c"], 2, 4, 2, True)]
    of_first = [([1, 2], 2, 0, 2, True), ([1, 2], 1, 2, 1, False)]
    assert split(request([[1, 2], [3]], n=3), 2) == [*of_first, ([3], 2, 3, 2, True), ([3], 1, 5, 1, False)]
    refused_by_the_engine = request(n=9, temperature=0)
    assert split(refused_by_the_engine, 1) == [(None, 9, 0, 1, True)]


def test_seeds_go_on_as_the_engine_s_do() -> None:
    parts = [part.request for part in split_request(request(n=7, seed=(1 << 63) - 4), 3)]
    assert [part.sampling["seed"] for part in parts] == [(1 << 63) - 4, (1 << 63) - 1, -(1 << 63) + 2]
    assert len({part.request_id for part in parts}) == 3


async def test_every_sequence_gives_its_place_back_when_it_ends() -> None:
    async with answer(3, 4) as (engine, queue, stream):
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


async def test_parts_wait_one_after_another_and_come_back_as_one() -> None:
    async with answer(6, 2) as (engine, queue, stream):
        await settled()
        assert (list(engine.said), queue.taken, queue.waiting) == (["id", "id-1"], 4, 1)
        engine.say("id", piece(1, "b", "stop"))
        engine.say("id-1", piece(1, "d", "stop"), piece(0, "c", "stop"), end(5, 2), DONE)
        await settled()
        assert list(engine.said) == ["id", "id-1", "id-2"]
        engine.say("id", piece(0, "a", "stop"), end(5, 2), DONE)
        engine.say("id-2", piece(0, "e", "stop"), piece(1, "f", "stop"), end(5, 3), DONE)
        values = [value async for _, value in stream.pieces()]
        whole = joined(values)
        assert [choice["text"] for choice in whole["choices"]] == list("abcdef")
        assert [choice["index"] for choice in whole["choices"]] == list(range(6))
        assert values[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        assert {value["created"] for value in values} == {1}
    assert (queue.taken, queue.waiting) == (0, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_who_leaves_or_fails_takes_all_parts_along(fails: bool) -> None:
    with pytest.raises(EngineFailed) if fails else nullcontext():
        async with answer(6, 2) as (engine, queue, stream):
            await settled()
            assert (queue.taken, queue.waiting) == (4, 1)
            if fails:
                engine.say("id-1", b"data: nonsense\n\n")
                [_ async for _ in stream.pieces()]
    assert sorted(engine.left) == ["id", "id-1"]
    assert (queue.taken, queue.waiting) == (0, 0)


def test_chat_chunks_are_joined_into_the_message_of_the_engine() -> None:
    def chunk(index: int, reason: str | None = None, **delta: str) -> dict[str, Any]:
        logprobs = {"content": [{"token": delta["content"], "logprob": -1.0}]} if delta.get("content") else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {"id": "x", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}

    opened = [chunk(index, role="assistant", content="") for index in (1, 0)]
    said = [chunk(1, content="b"), chunk(0, reasoning="so"), chunk(0, content="a ")]
    ended = [chunk(0, "length", content="c") | {"system_fingerprint": "f"}, chunk(1, "stop")]
    chunks = [*opened, *said, *ended, {"choices": [], "usage": {"total_tokens": 3}}]
    value = joined(chunks)
    assert (value["id"], value["system_fingerprint"], value["usage"]) == ("x", "f", {"total_tokens": 3})
    first, second = value["choices"]
    assert first["message"] == {"role": "assistant", "content": "a c", "refusal": None, "reasoning": "so"}
    assert [one["token"] for one in first["logprobs"]["content"]] == ["a ", "c"]
    assert (first["finish_reason"], second["finish_reason"]) == ("length", "stop")
    assert second["message"]["content"] == "b"


def test_an_answer_is_joined_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_JOINED_BYTES", 900)
    logprobs = {"content": [{"token": "sea", "logprob": -0.5}] * 10}
    pieces = [{"index": index, "delta": {"content": "sea "}, "logprobs": logprobs} for index in range(3)]
    assert len(joined([{"choices": [piece]} for piece in pieces[:2]])["choices"]) == 2
    with pytest.raises(InvalidRequest, match="set stream, or ask for less"):
        joined([{"choices": pieces}])


@pytest.mark.parametrize("top", [0, 5])
async def test_long_answer_takes_little_more_memory_than_its_bytes(top: int) -> None:
    logprobs = {"content": [{"token": "sea", "logprob": -0.5, "top_logprobs": [{"token": "rye"}] * top}]}
    choice = {"delta": {"content": "sea "}, "logprobs": logprobs if top else None}
    taken_bytes = 0

    async def pieces() -> AsyncIterator[Piece]:
        nonlocal taken_bytes
        tracemalloc.start()
        for number in range(4000):
            yield "", orjson.loads(orjson.dumps({"choices": [{"index": number % 4} | choice]}))
        yield "", end(5, 4000)
        own = [tracemalloc.Filter(True, file) for file in (__file__, routes.__file__)]  # other threads allocate, too
        taken = tracemalloc.take_snapshot().filter_traces(own).statistics("filename")
        taken_bytes = sum(each.size for each in taken)
        tracemalloc.stop()

    nothing: Any = None
    answer: Any = SimpleNamespace(
        request=SimpleNamespace(learnt=None),
        pieces=pieces,
        public_id="x",
        personalization=Personalization(Level.BASE),
        prompt=UserPrompt([], 0, None, None),
        stream=SimpleNamespace(first=SimpleNamespace(first_token_s=0.0), moved=0),
        timings=SimpleNamespace(ms={}),
    )
    body = ChatRequest(messages=[ChatMessage(role="user", content="hello")])
    sent = await OpenAIResponse(nothing, nothing, body).whole(answer)
    assert orjson.loads(sent)["choices"][3]["message"]["content"] == "sea " * 1000
    assert 0 < taken_bytes < 2 * len(sent)


def read(*pieces: bytes) -> list[object]:
    class Chunks:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

    async def collect() -> list[object]:
        return [value async for value in events(Chunks())]

    return asyncio.run(collect())


def without_nul(value: Any) -> Any:
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value


TEXT = st.text() | st.text("\0\\u", max_size=6)
VALUES = st.lists(st.dictionaries(TEXT, TEXT | st.integers(-9, 9)), max_size=5)


@given(VALUES, st.lists(st.integers(0, 400), max_size=8))
def test_events_do_not_depend_on_where_the_bytes_were_cut(values: list[dict[str, Any]], cuts: list[int]) -> None:
    whole = b"".join(map(event, values)) + DONE
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    wanted = [{without_nul(name): without_nul(text) for name, text in value.items()} for value in values]
    assert read(*(whole[a:b] for a, b in itertools.pairwise(places))) == wanted


def test_what_is_no_event_or_comes_after_the_end_is_passed_over() -> None:
    assert read(b': ping\r\nid: 3\r\ndata: {"a": 1}\r\n\r\n', DONE) == [{"a": 1}]
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
    await asyncio.sleep(0.01)
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    bodies = [message["body"] for message in sent[1:-1]]
    assert [body for body in bodies if body != KEEP_ALIVE] == [event(number) for number in range(5)]
    assert bodies[0] == KEEP_ALIVE
    head = dict(sent[0]["headers"])
    assert head[b"server-timing"] == b"x"
    assert b"content-length" not in head


async def test_events_of_a_waiting_job_keep_the_stream_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.gateway.http.streaming.KEEP_ALIVE_S", 0.005)
    monkeypatch.setattr("server.gateway.routes.jobs._POLL_S", 0.02)
    queued = Job(JobId("a" * 26, 1), JobState.QUEUED, "{}", 1, "9f2c41d0")
    read_job = AsyncMock(side_effect=[queued, queued, replace(queued, state=JobState.CANCELLED)])
    sent: list[bytes] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))

    await _JobEvents(read_job, queued)({"state": {}}, asyncio.Event().wait, send)
    head, first, *comments, last, done, end = sent
    assert (head, set(comments), done, end) == (b"", {KEEP_ALIVE}, b"event: done\n" + DONE, b"")
    for body, state in ((first, b'"state":"queued"'), (last, b'"state":"cancelled"')):
        assert body.startswith(b"event: job\ndata: {") and state in body


@pytest.mark.parametrize(("stream", "error"), [(event(1), EOFError), (b"data: {oops\n\n", ValueError)])
def test_a_broken_stream_is_noticed(stream: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read(stream)
