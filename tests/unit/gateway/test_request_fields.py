"""What requests may hold: of `/generate`, of profiles and, field by field, of OpenAI's routes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from server.errors import InvalidRequest
from server.gateway.generation.request import Personalize
from server.gateway.http.errors import MAX_SHOWN_CHARS, fault_of
from server.gateway.routes.openai.requests import IGNORED, OWN_FIELDS, REFUSED, ChatRequest, CompletionRequest
from server.gateway.routes.requests import GenerateRequest
from server.gateway.routes.users import ItemsRequest

LEAST = {"user_id": "ada", "prompt": "hi"}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "default": None}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def fault(model: type[BaseModel], value: object) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return fault_of(caught.value.errors())


def test_the_least_request_gets_the_documented_defaults() -> None:
    request = GenerateRequest.model_validate(LEAST)
    assert (request.max_tokens, request.temperature, request.top_p) == (128, 1.0, 1.0)
    assert (request.stream, request.personalize, request.stop) == (False, Personalize.AUTO, None)
    assert GenerateRequest.model_validate(LEAST | {"stop": "END"}).stop == ["END"]


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 0},
        {"temperature": 2, "top_p": 1},
        {"stop": ["a", "b"]},
        {"seed": -(1 << 63)},
        {"personalize": "merged"},
        {"messages": None},
    ],
)
def test_good_values_are_taken(extra: dict[str, Any]) -> None:
    GenerateRequest.model_validate(LEAST | extra)


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
    assert fault(GenerateRequest, LEAST | extra).param == param


@pytest.mark.parametrize("history", [-1, 17, 1.0, True, "1", "AUTO", [], "auto "])
def test_a_history_is_a_small_number_or_auto(history: Any) -> None:
    error = fault(GenerateRequest, LEAST | {"history": history})
    assert error.param == "history"
    assert "from 0 to 16, or auto" in error.message


def test_the_message_shows_the_value_but_never_all_of_a_long_one() -> None:
    assert "-5" in fault(GenerateRequest, LEAST | {"max_tokens": -5}).message
    message = fault(GenerateRequest, LEAST | {"user_id": "x" * 100_000}).message
    assert "xxx" in message
    assert len(message) < 3 * MAX_SHOWN_CHARS


def test_a_million_wrong_items_are_one_finding() -> None:
    with pytest.raises(ValidationError) as caught:
        ItemsRequest.model_validate({"items": [0] * 1_000_000})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_is_ignored_is_taken_whatever_it_holds(name: str) -> None:
    for value in (True, {"a": [1]}, "auto"):
        assert ChatRequest.model_validate(CHAT | {name: value}) == ChatRequest.model_validate(CHAT)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_steers_the_engine_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest.model_validate(CHAT | {name: None})
    assert (caught.value.param, caught.value.code) == (name, "refused_field")


@pytest.mark.parametrize("name", ["top_k", "guided_json", "echo", "user_id", "prompt"])
def test_what_is_unknown_is_refused_by_name_even_as_null(name: str) -> None:
    error = fault(ChatRequest, CHAT | {name: None})
    assert (error.param, error.code) == (name, "unknown_field")


PASSED: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 2,
    "stop": ["END"],
    "seed": 7,
    "logprobs": True,
    "top_logprobs": 3,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100.0},
    "max_tokens": 9,
    "max_completion_tokens": 8,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [None]}}},
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "parallel_tool_calls": False,
}


def test_what_is_passed_on_is_passed_as_it_came() -> None:
    known = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert PASSED.keys() | {"echo"} == known - OWN_FIELDS
    assert ChatRequest.model_validate(CHAT | PASSED).engine_fields == PASSED
    of_texts = {"echo": True, "logprobs": 2}
    assert CompletionRequest.model_validate(TEXT | of_texts).engine_fields == of_texts


def test_nothing_is_passed_that_was_not_sent_and_null_is_nothing() -> None:
    request = ChatRequest.model_validate(CHAT | dict.fromkeys(PASSED) | {"model": None, "user": None, "stream": None})
    assert (request.engine_fields, request.model, request.stream) == ({}, "mta", False)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": "1"}, "temperature"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": {"a": 1 << 64}}, "tool_choice"),
        ({"tools": [TOOL | {"function": {"name": "f", "parameters": {"a": 1 << 64}}}]}, "tools.0.function.parameters"),
        ({"response_format": {"type": "text", "a": 1 << 64}}, "response_format"),
        ({"max_completion_tokens": 1 << 31}, "max_completion_tokens"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"strength": 0.33}, "strength"),
        ({"strength": 1.05}, "strength"),
        ({"user": "a b"}, "user"),
        ({"history": 17}, "history"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages.0.audio"),
    ],
)
def test_other_values_of_openais_are_refused_by_name(extra: dict[str, Any], param: str) -> None:
    assert fault(ChatRequest, CHAT | extra).param == param


def test_strength_comes_in_steps_and_floats_hit_them() -> None:
    for step in range(21):
        assert ChatRequest.model_validate(CHAT | {"strength": step * 0.05}).strength == step * 0.05


def test_a_conversation_with_tools_that_a_client_echoes_is_taken() -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "function_call": None}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    said = [{"role": "user", "content": parts}, answer, {"role": "tool", "tool_call_id": "c1", "content": ""}]
    messages = ChatRequest.model_validate({"messages": said}).messages
    assert [message.model_dump(exclude_unset=True) for message in messages] == [
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
    ]


@pytest.mark.parametrize("prompt", ["a", ["a"], ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_prompts_are_texts_or_token_ids(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", 1], [True], [-1], [1 << 31], [[1], "a"], 5, {"a": 1}])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert fault(CompletionRequest, {"prompt": prompt}).param == "prompt"


def test_one_request_gets_only_so_many_answers() -> None:
    for prompt in (["a"] * 64, [1] * 500):
        CompletionRequest.model_validate({"prompt": prompt, "n": 2})
    assert fault(CompletionRequest, {"prompt": ["a"] * 65, "n": 2}).param == "prompt"


def test_a_completion_has_neither_history_nor_tools() -> None:
    for name in ("history", "tools", "messages", "max_completion_tokens"):
        error = fault(CompletionRequest, TEXT | {name: 1})
        assert (error.param, error.code) == (name, "unknown_field")
