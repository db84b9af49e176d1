"""Examples in the API's document are whole and valid; docs/openai.md lists the fields that there are."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, TypeAdapter

from server.gateway.app import create_app
from server.gateway.routes.answering import PersonalizationAnswer, Usage
from server.gateway.routes.generate import GenerateAnswer
from server.gateway.routes.jobs import AdaptRequest, JobAnswer
from server.gateway.routes.openai.requests import IGNORED, OWN_FIELDS, REFUSED, ChatRequest, CompletionRequest
from server.gateway.routes.requests import GenerateRequest
from server.gateway.routes.users import ItemsRequest
from server.settings import Settings
from tests.support.documented import ROOT

DOCUMENT = create_app(Settings()).openapi()


class Chunk(ChatCompletionChunk):
    """OpenAI's, with what we put beside it."""

    model_config = ConfigDict(extra="forbid")
    personalization: PersonalizationAnswer | None = None
    usage: Usage | None = None  # type: ignore[assignment]
    timings_ms: dict[str, float] | None = None


def check_whole(shape: Any, text: str) -> None:
    """Fail unless a value has the fields of its shape, all of them and no other."""
    adapter = TypeAdapter(shape)
    dumped = adapter.dump_python(adapter.validate_json(text), mode="json", exclude_unset=shape is Chunk)
    assert dumped == json.loads(text)


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


def test_the_table_of_openais_fields_is_the_gateways() -> None:
    text = (ROOT / "docs/openai.md").read_text(encoding="utf-8")
    rows = [set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| (`\w+`.*?) \|", text, re.MULTILINE)]
    ours, personal, passed, ignored, refused = rows[-5:]
    passed_on = (ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()) - OWN_FIELDS
    assert (ours | personal, passed, ignored, refused) == (OWN_FIELDS, passed_on, IGNORED, REFUSED)
