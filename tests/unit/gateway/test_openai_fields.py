"""What becomes of each field of OpenAI's requests."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.errors import InvalidRequest
from server.gateway.http.errors import fault_of
from server.gateway.routes.openai.requests import IGNORED, OURS, STEERING, ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "default": None}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def fault(model: type[ChatRequest | CompletionRequest], value: object) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    error = fault_of(caught.value.errors())
    return error.param, error.code


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_is_ignored_is_taken_whatever_it_holds(name: str) -> None:
    for value in (True, {"a": [1]}, "auto"):
        assert ChatRequest.model_validate(CHAT | {name: value}) == ChatRequest.model_validate(CHAT)


@pytest.mark.parametrize("name", sorted(STEERING))
def test_what_steers_the_engine_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest.model_validate(CHAT | {name: None})
    assert (caught.value.param, caught.value.code) == (name, "refused_field")


@pytest.mark.parametrize("name", ["top_k", "guided_json", "echo", "user_id", "prompt"])
def test_what_is_unknown_is_refused_by_name_even_as_null(name: str) -> None:
    assert fault(ChatRequest, CHAT | {name: None}) == (name, "unknown_field")


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
    assert PASSED.keys() | {"echo"} == (ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()) - OURS
    assert ChatRequest.model_validate(CHAT | PASSED).passed == PASSED
    assert CompletionRequest.model_validate(TEXT | {"echo": True, "logprobs": 2}).passed == {
        "echo": True,
        "logprobs": 2,
    }


def test_nothing_is_passed_that_was_not_sent_and_null_is_nothing() -> None:
    request = ChatRequest.model_validate(CHAT | dict.fromkeys(PASSED) | {"model": None, "user": None, "stream": None})
    assert (request.passed, request.model, request.stream) == ({}, "mta", False)


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
def test_other_values_are_refused_by_name(extra: dict[str, Any], param: str) -> None:
    assert fault(ChatRequest, CHAT | extra)[0] == param


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
    assert fault(CompletionRequest, {"prompt": prompt})[0] == "prompt"


@pytest.mark.parametrize(
    ("prompt", "n", "taken"), [(["a"] * 64, 2, True), (["a"] * 65, 2, False), ([1] * 500, 2, True)]
)
def test_one_request_gets_only_so_many_answers(prompt: Any, n: int, taken: bool) -> None:
    if taken:
        CompletionRequest.model_validate({"prompt": prompt, "n": n})
    else:
        assert fault(CompletionRequest, {"prompt": prompt, "n": n})[0] == "prompt"


def test_a_completion_has_neither_history_nor_tools() -> None:
    for name in ("history", "tools", "messages", "max_completion_tokens"):
        assert fault(CompletionRequest, TEXT | {name: 1}) == (name, "unknown_field")
