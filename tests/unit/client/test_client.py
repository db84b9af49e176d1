"""What the client sends and refuses to send, and how it reads responses, whoever sent them."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields
from inspect import iscoroutine, isfunction, signature
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

import mta_client
from mta_client import AsyncClient, Client, MtaError
from mta_client.calls import Patience
from server.gateway.routes import answering, feedback, generate, jobs, users, worth

ALONE = "\ud800"  # a lone surrogate, which cannot be encoded
JOB = jobs.EXAMPLE.model_dump(mode="json") | {"of a later version": True}
BUSY = {"error": {"message": "busy", "code": "overloaded", "param": None}}
PIECE = {"choices": [{"index": 0, "delta": {"content": "a\u2028b\x85c"}, "finish_reason": None}]}


class Awaited:
    """`AsyncClient` with the blocking methods of `Client`."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(url, **options)

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._client.__aexit__())
        self._loop.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            answer = getattr(self._client, name)(*arguments, **options)
            return self._loop.run_until_complete(answer) if iscoroutine(answer) else self._pieces(answer)

        return call

    def _pieces(self, answer: AsyncIterator[Any]) -> Iterator[Any]:
        end = object()
        while (piece := self._loop.run_until_complete(anext(answer, end))) is not end:  # type: ignore[arg-type]
            yield piece


@pytest.fixture(params=[Client, Awaited])
def kind(request: pytest.FixtureRequest) -> Any:
    """One of both clients."""
    return request.param


def test_both_clients_have_the_same_methods() -> None:
    own = {name: signature(method) for name, method in vars(Client).items() if isfunction(method) and name[0] != "_"}
    twin = {name: signature(method) for name, method in vars(AsyncClient).items() if isfunction(method)}
    assert own.keys() - twin.keys() == {"stop"}  # a coroutine is cancelled instead
    assert all(own[name].parameters == twin[name].parameters for name in own.keys() - {"stop"})
    assert signature(Client).parameters == signature(AsyncClient).parameters


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.user(ALONE),
        lambda client: client.forget(ALONE, missing_ok=True),
        lambda client: client.wait(ALONE),
        lambda client: client.user("a" * 100_000),
        lambda client: client.user(7),
        lambda client: client.put_profile("ada", [ALONE]),
        lambda client: client.add_items("ada", [7]),
        lambda client: client.put_profile("ada", "no list"),
        lambda client: client.put_profile("ada", {"text": "no list"}),
        lambda client: client.generate("ada", ALONE),
        lambda client: client.generate("ada", [7]),
        lambda client: client.generate("ada", "hello", temperature=math.nan),
        lambda client: client.generate("ada", "hello", stop=b"x"),
        lambda client: next(client.stream("ada", "hello", temperature=math.inf)),
        lambda client: client.adapt("ada", [7]),
    ],
)
def test_what_cannot_be_encoded_is_not_sent(kind: Any, call: Callable[[Client], object]) -> None:
    def reached(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request)

    transport = httpx.MockTransport(reached)
    with kind("http://server", transport=transport) as client, pytest.raises(MtaError) as failure:
        call(client)
    assert (failure.value.status, failure.value.code) == (0, "not_sendable")
    failure.value.message.encode()


def test_an_id_is_one_segment_of_a_path(kind: Any) -> None:
    paths = []

    def refuse(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(404, json={"error": {"message": "unknown", "code": "not_found", "param": None}})

    with kind("http://server", transport=httpx.MockTransport(refuse)) as client:
        for call in (client.user, client.wait, lambda job_id: next(client.events(job_id))):
            with pytest.raises(MtaError, match="unknown"):
                call("a\nb/?#%2F")
    segment = b"a%0Ab%2F%3F%23%252F"
    assert paths == [b"/users/" + segment, b"/jobs/" + segment, b"/jobs/" + segment + b"/events"]


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (mta_client.Anchor, answering.AnchorAnswer),
        (mta_client.Answer, generate.GenerateAnswer),
        (mta_client.Erased, users.ErasedAnswer),
        (mta_client.Feedback, feedback.FeedbackAnswer),
        (mta_client.Job, jobs.JobAnswer),
        (mta_client.Personalization, answering.PersonalizationAnswer),
        (mta_client.Profile, users.ProfileAnswer),
        (mta_client.User, users.UserAnswer),
        (mta_client.Worth, worth.WorthAnswer),
    ],
)
def test_values_have_the_fields_of_answers(value: type, answer: type[BaseModel]) -> None:
    assert [field.name for field in fields(value)] == list(answer.model_fields)


LOST = b"\0"


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for place in range(len(self._body)):
            piece = self._body[place : place + 1]
            if piece == LOST:
                raise httpx.ReadError("the connection is lost")
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in iter(self):
            yield piece


def served(kind: Any, body: bytes, status: int = 200) -> Any:
    """A client of a server that answers every request with this body, a byte at a time."""
    transport = httpx.MockTransport(lambda request: httpx.Response(status, stream=Pieces(body)))
    return kind("http://server", transport=transport, retry_s=0)


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def test_events_are_read_up_to_done_and_comments_skipped(kind: Any) -> None:
    events = b": keep-alive\n\nevent: job\n" + event(JOB) + b": keep-alive\n\n" + event(JOB | {"state": "succeeded"})
    with served(kind, events + b"data: [DONE]\n\ndata: no json\n\n") as client:
        assert [job.state for job in client.events("key.1")] == ["running", "succeeded"]


def test_a_chunk_says_how_many_of_its_tokens_phrases_moved(kind: Any) -> None:
    with served(kind, event(PIECE) + event(PIECE | {"moved": 2}) + b"data: [DONE]\n\n") as client:
        assert [chunk.moved for chunk in client.stream("ada", "hello")] == [0, 2]


def test_a_stream_that_breaks_off_is_an_error_after_its_events(kind: Any) -> None:
    error = {"message": "the engine died", "type": "server_error", "param": None, "code": "engine_unavailable"}
    ends = ((b"", "broken_off"), (LOST, "broken_off"), (event({"error": error}), "engine_unavailable"))
    unread: list[Any] = [7, {"choices": [{"delta": None, "finish_reason": None}]}]
    for rest, code in (*ends, *((event(value), "not_understood") for value in unread)):
        with served(kind, event(PIECE) + rest) as client:
            chunks = client.stream("ada", "hello")
            assert next(chunks).text == "a\u2028b\x85c"  # not separators of lines
            with pytest.raises(MtaError) as failure:
                next(chunks)
        assert (failure.value.code, failure.value.status) == (code, 0)


def test_an_error_outlives_its_process() -> None:
    error = MtaError("no such user", "not_found", status=404, param="user_id", retry_after_s=2.0)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *[(502, b"<html>Bad Gateway"), (502, b'{"error": "no"}'), (301, b"")],
        *[(200, body) for body in (b"<html>", b"{}", b"[]", b'{"id": "key.1"}', b"\xff")],
    ],
)
def test_other_responses_are_errors_too(kind: Any, status: int, body: bytes) -> None:
    with served(kind, body, status) as client, pytest.raises(MtaError) as failure:
        client.wait("key.1")
    assert (failure.value.status, failure.value.code) == (0 if status == 200 else status, "not_understood")
    assert status == 200 or failure.value.message == body.decode()


def test_a_wrong_url_is_not_taken_for_an_unknown_user(kind: Any) -> None:
    body = b'{"error": {"message": "no such route", "code": "not_found", "param": null}}'
    with served(kind, body, 404) as client, pytest.raises(MtaError, match="no such route"):
        client.forget("ada", missing_ok=True)


class Busy:
    """A server that gives these answers first, each a status and the time after which to ask again, and then a job."""

    def __init__(self, *answers: tuple[int, str | None]) -> None:
        self.answers = list(answers)
        self.bodies = list[bytes]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(request.content)
        if not self.answers:
            if request.url.path.endswith("/events"):
                return httpx.Response(200, content=event(JOB) + b"data: [DONE]\n\n")
            return httpx.Response(200, json=JOB)
        status, after = self.answers.pop(0)
        if not status:
            raise httpx.ConnectError("nobody there")
        return httpx.Response(status, json=BUSY, headers={"Retry-After": after} if after else {})


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long calls were to wait, each time; nobody waits for that long here."""
    asked, pause_s = list[float](), Patience.pause_s

    def noted(self: Patience, error: MtaError) -> float:
        asked.append(pause_s(self, error))
        return 0.0

    monkeypatch.setattr("random.uniform", lambda low, high: low)
    monkeypatch.setattr(Patience, "pause_s", noted)
    return asked


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.adapt("ada", [{"input": "a", "output": "b"}], idempotency_key="once"),
        lambda client: next(client.events("key.1")),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says_so(
    kind: Any, call: Callable[[Client], Any], waits: list[float]
) -> None:
    server = Busy((429, "7"), (503, None), (0, None), (502, None))
    with kind("http://server", transport=httpx.MockTransport(server)) as client:
        assert call(client).id == JOB["id"]
    assert waits == [7, 1, 2, 4]
    assert len(server.bodies) == 5
    assert len(set(server.bodies)) == 1


@pytest.mark.parametrize(("answer", "retry_s"), [((400, None), 30), ((429, "31"), 30), ((503, "1"), 0)])
def test_a_refusal_and_a_long_wait_are_errors_at_once(
    kind: Any, answer: tuple[int, str | None], retry_s: float, waits: list[float]
) -> None:
    server = Busy(answer)
    with (
        kind("http://server", transport=httpx.MockTransport(server), retry_s=retry_s) as client,
        pytest.raises(MtaError, match="busy") as failure,
    ):
        client.user("ada")
    assert (failure.value.status, failure.value.is_transient) == (answer[0], answer[0] != 400)
    assert failure.value.retry_after_s == (float(answer[1]) if answer[1] else None)
    assert (len(server.bodies), waits) == (1, [])


@pytest.mark.parametrize("url", ["server", "localhost:8000"])
def test_a_url_without_a_scheme_is_an_error_at_once(kind: Any, url: str, waits: list[float]) -> None:
    with kind(url) as client, pytest.raises(MtaError, match=r"protocol") as failure:
        client.user("ada")
    assert (failure.value.code, failure.value.is_transient, waits) == ("not_sendable", False, [])


def test_white_space_around_a_key_is_no_part_of_it(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def note(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["Authorization"])
        return httpx.Response(200, json=JOB)

    monkeypatch.setenv("MTA_API_KEY", "mta_key\n")  # as files of secrets often end
    with kind("http://server", transport=httpx.MockTransport(note)) as client:
        client.job("key.1")
    assert sent == ["Bearer mta_key"]


def test_whether_a_server_is_ready_is_asked_once(kind: Any) -> None:
    server = Busy((503, "1"))
    with kind("http://server", transport=httpx.MockTransport(server)) as client:
        assert not client.ready()
        assert client.ready()
