"""What requests may look like."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.gateway.generation.request import Personalize
from server.gateway.http.errors import MAX_SHOWN_CHARS, fault_of
from server.gateway.routes.requests import GenerateRequest, ItemsRequest

LEAST = {"user_id": "ada", "prompt": "hi"}


def fault(model: type[GenerateRequest | ItemsRequest], value: object) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    error = fault_of(caught.value.errors())
    return error.param, error.message


def test_the_least_request_gets_the_documented_defaults() -> None:
    request = GenerateRequest.model_validate(LEAST)
    assert (request.max_tokens, request.temperature, request.top_p) == (128, 1.0, 1.0)
    assert (request.stream, request.personalize, request.stop) == (False, Personalize.AUTO, None)


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 0},
        {"temperature": 2, "top_p": 1},
        {"stop": "\n"},
        {"stop": ["a", "b"]},
        {"seed": -(1 << 63)},
        {"personalize": "merged"},
        {"messages": None},
    ],
)
def test_good_values_are_taken(extra: dict[str, Any]) -> None:
    GenerateRequest.model_validate(LEAST | extra)


def test_one_stop_is_a_list_of_one() -> None:
    assert GenerateRequest.model_validate(LEAST | {"stop": "END"}).stop == ["END"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": []}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": list("abcde")}, "stop"),
        ({"personalize": "stacked"}, "personalize"),
        ({"model": "gpt"}, "model"),
        ({"user_id": 7}, "user_id"),
        ({"user_id": None}, "user_id"),
        ({"prompt": None}, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"prompt": None, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"prompt": None, "messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
    ],
)
def test_other_values_are_refused_by_name(extra: dict[str, Any], param: str) -> None:
    assert fault(GenerateRequest, LEAST | extra)[0] == param


def test_the_message_shows_the_value_but_never_all_of_a_long_one() -> None:
    _, message = fault(GenerateRequest, LEAST | {"max_tokens": -5})
    assert "-5" in message
    _, message = fault(GenerateRequest, LEAST | {"user_id": "x" * 100_000})
    assert "xxx" in message
    assert len(message) < 3 * MAX_SHOWN_CHARS


def test_a_million_wrong_items_are_one_finding() -> None:
    with pytest.raises(ValidationError) as caught:
        ItemsRequest.model_validate({"items": [0] * 1_000_000})
    assert caught.value.error_count() == 1
