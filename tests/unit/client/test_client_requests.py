"""What the client sends and what it cannot send, and that its values have all that the server answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import httpx
import pytest
from pydantic import BaseModel

import mta_client
from mta_client import Client, MtaError
from server.gateway.routes import answers

ALONE = "\ud800"
"""Half of a character: in no text that can be sent."""


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
def test_what_cannot_be_sent_is_an_error_of_ours_and_is_not(call: Callable[[Client], object]) -> None:
    def reached(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request)

    transport = httpx.MockTransport(reached)
    with Client("http://server", transport=transport) as client, pytest.raises(MtaError) as failure:
        call(client)
    assert (failure.value.status, failure.value.code) == (0, "not_sendable")
    failure.value.message.encode()


def test_an_id_is_one_piece_of_a_path_whatever_is_in_it() -> None:
    asked = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path)
        return httpx.Response(404, json={"error": {"message": "unknown", "code": "not_found", "param": None}})

    with Client("http://server", transport=httpx.MockTransport(refuse)) as client:
        for call in (client.user, client.wait, lambda job_id: next(client.events(job_id))):
            with pytest.raises(MtaError, match="unknown"):
                call("a\nb/?#%2F")
    piece = b"a%0Ab%2F%3F%23%252F"
    assert asked == [b"/users/" + piece, b"/jobs/" + piece, b"/jobs/" + piece + b"/events"]


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (mta_client.Anchor, answers.AnchorAnswer),
        (mta_client.Answer, answers.GenerateAnswer),
        (mta_client.Erased, answers.ErasedAnswer),
        (mta_client.Job, answers.JobAnswer),
        (mta_client.Personalization, answers.PersonalizationAnswer),
        (mta_client.Profile, answers.ProfileAnswer),
        (mta_client.User, answers.UserAnswer),
    ],
)
def test_values_have_the_fields_of_answers(value: type, answer: type[BaseModel]) -> None:
    assert [field.name for field in fields(value)] == list(answer.model_fields)
