"""What the client sends and refuses to send, and how it reads responses, whoever sent them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

import mta_client
from mta_client import Client, MtaError
from server.gateway.routes import answering, feedback, generate, jobs, users, worth

ALONE = "\ud800"  # a lone surrogate, which cannot be encoded
JOB = jobs.EXAMPLE.model_dump(mode="json") | {"of a later version": True}
PIECE = {"choices": [{"index": 0, "delta": {"content": "a\u2028b\x85c"}, "finish_reason": None}]}


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
        lambda client: client.generate("ada", ALONE),
        lambda client: client.generate("ada", [7]),
        lambda client: client.generate("ada", "hello", temperature=math.nan),
        lambda client: client.generate("ada", "hello", stop=b"x"),
        lambda client: next(client.stream("ada", "hello", temperature=math.inf)),
        lambda client: client.adapt("ada", ["no mapping"]),
    ],
)
def test_what_cannot_be_encoded_is_not_sent(call: Callable[[Client], object]) -> None:
    def reached(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request)

    transport = httpx.MockTransport(reached)
    with Client("http://server", transport=transport) as client, pytest.raises(MtaError) as failure:
        call(client)
    assert (failure.value.status, failure.value.code) == (0, "not_sendable")
    failure.value.message.encode()


def test_an_id_is_one_segment_of_a_path() -> None:
    paths = []

    def refuse(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(404, json={"error": {"message": "unknown", "code": "not_found", "param": None}})

    with Client("http://server", transport=httpx.MockTransport(refuse)) as client:
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


class Pieces(httpx.SyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return (self._body[place : place + 1] for place in range(len(self._body)))


def served(body: bytes, status: int = 200) -> Client:
    """A client of a server that answers every request with this body, a byte at a time."""
    transport = httpx.MockTransport(lambda request: httpx.Response(status, stream=Pieces(body)))
    return Client("http://server", transport=transport)


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def test_events_are_read_up_to_done_and_comments_skipped() -> None:
    events = b": keep-alive\n\nevent: job\n" + event(JOB) + b": keep-alive\n\n" + event(JOB | {"state": "succeeded"})
    with served(events + b"data: [DONE]\n\ndata: no json\n\n") as client:
        assert [job.state for job in client.events("key.1")] == ["running", "succeeded"]


def test_a_stream_that_breaks_off_is_an_error_after_its_events() -> None:
    error = {"message": "the engine died", "type": "server_error", "param": None, "code": "engine_unavailable"}
    for rest, code in ((b"", "broken_off"), (event({"error": error}), "engine_unavailable")):
        with served(event(PIECE) + rest) as client:
            chunks = client.stream("ada", "hello")
            assert next(chunks).text == "a\u2028b\x85c"  # not separators of lines
            with pytest.raises(MtaError) as failure:
                next(chunks)
        assert (failure.value.code, failure.value.status) == (code, 0)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *[(502, b"<html>Bad Gateway"), (502, b'{"error": "no"}'), (301, b"")],
        *[(200, body) for body in (b"<html>", b"{}", b"[]", b'{"id": "key.1"}', b"\xff")],
    ],
)
def test_other_responses_are_errors_too(status: int, body: bytes) -> None:
    with served(body, status) as client, pytest.raises(MtaError) as failure:
        client.wait("key.1")
    assert (failure.value.status, failure.value.code) == (0 if status == 200 else status, "not_understood")
    assert status == 200 or failure.value.message == body.decode()
