"""Examples in the API's document, the README and docs/openai.md: whole, and as the gateway would answer today."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from server.errors import InvalidRequest
from server.gateway.app import create_app
from server.gateway.http.errors import ErrorAnswer, fault_of
from server.gateway.routes.answers import (
    ErasedAnswer,
    GenerateAnswer,
    JobAnswer,
    PersonalizationAnswer,
    ProfileAnswer,
    Usage,
)
from server.gateway.routes.openai.answers import ChatCompletion, ModelAnswer, ModelsAnswer, TextCompletion
from server.gateway.routes.openai.requests import IGNORED, OURS, STEERING, ChatRequest, CompletionRequest
from server.gateway.routes.requests import AdaptRequest, GenerateRequest, ItemsRequest
from server.settings import Settings
from tests.support.documented import ROOT, blocks_of, calls_of

DOCUMENT = create_app(Settings()).openapi()
PAGES = ("README.md", "docs/openai.md")
LEFT_OUT = ", …}"
"""How they end an object of which it does not show all."""

SHAPES: dict[str, tuple[type[BaseModel] | None, type[BaseModel]]] = {
    "PUT /users/rosa/profile": (ItemsRequest, ProfileAnswer),
    "POST /generate": (GenerateRequest, GenerateAnswer),
    "POST /users/kai/adapt": (AdaptRequest, JobAnswer),
    "GET /jobs/…/events": (None, JobAnswer),
    "DELETE /users/rosa": (None, ErasedAnswer),
    "POST /v1/chat/completions": (ChatRequest, ChatCompletion),
    "POST /v1/completions": (CompletionRequest, TextCompletion),
    "GET /v1/models": (None, ModelsAnswer),
    "GET /v1/models/mta": (None, ModelAnswer),
}
"""What each call of the README sends and is answered."""


class Chunk(ChatCompletionChunk):
    """OpenAI's, with what we put beside it."""

    model_config = ConfigDict(extra="forbid")
    personalization: PersonalizationAnswer | None = None
    usage: Usage | None = None  # type: ignore[assignment]
    timings_ms: dict[str, float] | None = None


def check_whole(shape: Any, text: str) -> None:
    """Fail unless a value has the fields of its shape, all of them and no other."""
    adapter = TypeAdapter(shape)
    assert adapter.dump_python(adapter.validate_json(text), mode="json", exclude_unset=shape is Chunk) == json.loads(
        text
    )


def check_shown(shape: type[BaseModel], value: dict[str, Any]) -> None:
    """Fail unless the fields that are shown are fields of the shape."""
    for name, inner in value.items():
        annotation = shape.model_fields[name].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            check_shown(annotation, inner)
        else:
            TypeAdapter(annotation).validate_json(json.dumps(inner))


def values_of(stream: str) -> list[str]:
    """The values of a stream's events."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line and not line.startswith("event: ")]
    return [line for line in lines if line != "[DONE]"]


def shown(path: str, method: str, media_type: str) -> Any:
    return DOCUMENT["paths"][path][method]["responses"]["200"]["content"][media_type]["example"]


def test_the_document_shows_a_whole_answer() -> None:
    check_whole(GenerateAnswer, json.dumps(shown("/generate", "post", "application/json")))


@pytest.mark.parametrize(
    ("path", "method", "shape"), [("/generate", "post", Chunk), ("/jobs/{job_id}/events", "get", JobAnswer)]
)
def test_the_document_shows_whole_events(path: str, method: str, shape: Any) -> None:
    values = values_of(shown(path, method, "text/event-stream"))
    assert values
    for value in values:
        check_whole(shape, value)


@pytest.mark.parametrize("model", [GenerateRequest, ItemsRequest, AdaptRequest])
def test_the_document_shows_requests_that_are_taken(model: type[BaseModel]) -> None:
    examples = DOCUMENT["components"]["schemas"][model.__name__]["examples"]
    assert examples
    for example in examples:
        model.model_validate_json(json.dumps(example))


def calls() -> Iterator[tuple[str, str | None, str]]:
    """Each call of the pages: method and path, what is sent, and the answer."""
    shown = [
        block.text for page in PAGES for block in blocks_of(page) if block.language == "console" and not block.reason
    ]
    for command, answer in (call for text in shown for call in calls_of(text)):
        sent = re.search(r"-d '(.*)'", command, re.DOTALL)
        method = re.search(r"-X (\w+)", command)
        path = re.search(r"localhost:8000(\S+)", command)[1]
        yield f"{method[1] if method else 'POST' if sent else 'GET'} {path}", sent and sent[1], answer


@pytest.mark.parametrize(("route", "sent", "answer"), list(calls()))
def test_the_readme_shows_what_is_sent_and_answered(route: str, sent: str | None, answer: str) -> None:
    request_shape, shape = SHAPES[route]
    if answer.startswith('{"error"'):
        with pytest.raises((ValidationError, InvalidRequest)) as caught:
            request_shape.model_validate_json(sent)
        fault = caught.value if isinstance(caught.value, InvalidRequest) else fault_of(caught.value.errors())
        assert json.loads(answer) == ErrorAnswer.of(fault).model_dump()
        return
    if request_shape:
        request_shape.model_validate_json(sent.replace(", … ten of them …", ""))
    for value in values_of(answer) if answer.startswith("data: ") else [answer]:
        whole = json.dumps(json.loads(value.replace(LEFT_OUT, "}"), strict=False))  # a text may be broken into lines
        if LEFT_OUT in value:
            check_shown(shape, json.loads(whole))
        else:
            check_whole(shape, whole)


def test_the_table_of_openais_fields_is_the_gateways() -> None:
    text = (ROOT / "docs/openai.md").read_text(encoding="utf-8")
    rows = [set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| (`\w+`.*?) \|", text, re.MULTILINE)]
    ours, personal, passed, ignored, refused = rows[-5:]
    passed_on = (ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()) - OURS
    assert (ours | personal, passed, ignored, refused) == (OURS, passed_on, IGNORED, STEERING)


def test_every_call_of_the_readme_was_found() -> None:
    assert {route for route, _, _ in calls()} == SHAPES.keys()
