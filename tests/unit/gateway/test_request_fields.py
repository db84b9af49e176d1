"""What requests may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from server.errors import InvalidRequest
from server.gateway.generation.request import Personalize
from server.gateway.http.errors import MAX_SHOWN_CHARS, fault_of
from server.gateway.routes.openai.requests import (
    IGNORED,
    OWN_FIELDS,
    REFUSED,
    ChatRequest,
    CompletionRequest,
)
from server.gateway.routes.openai.schemas import MAX_BYTES, MAX_STATES, states_of
from server.gateway.routes.requests import GenerateRequest
from server.gateway.routes.users import ItemsRequest
from server.settings import Sampling

ENDLESS = ("(a{1,127}b{1,127}){1,127}", "((((a?){1,100})?){1,100})?", r"(\d{1,50}[a-z]{1,50}){1,127}", "^.{1,5000}$")


BEYOND = ("a{129}", "(ab){0,129}", "x{2}y{129,}", "[a-z]{1, 200 }", "a{9999999999}")
"""Patterns with a count that no engine compiles, though they have few states."""


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
LEAST: dict[Any, dict[str, Any]] = {
    GenerateRequest: {"user_id": "ada", "prompt": "hi"},
    ChatRequest: CHAT,
    CompletionRequest: {"prompt": "hi"},
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "default": None}}}
SECRET = {"role": "user", "content": "unmistakable"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def fault(model: type[BaseModel], extra: Mapping[str, object]) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(LEAST[model] | extra)
    return fault_of(caught.value.errors())


def test_the_least_request_gets_the_documented_defaults() -> None:
    least = LEAST[GenerateRequest]
    request = GenerateRequest.model_validate(least)
    assert [getattr(request, name) for name in ("max_tokens", *Sampling.model_fields)] == [None] * 6
    assert (request.stream, request.personalize, request.stop) == (False, Personalize.AUTO, None)
    assert GenerateRequest.model_validate(least | {"stop": "END", "temperature": 0}).stop == ["END"]
    good = {"temperature": 2, "top_p": 1, "stop": ["a", "b"], "seed": -(1 << 63), "personalize": "merged"}
    GenerateRequest.model_validate(least | good | {"messages": None})


WRONG: Mapping[Any, Mapping[str, Sequence[Any]]] = {
    GenerateRequest: {
        "temperature": (True, "1", -0.1),
        "top_p": (0,),
        "max_tokens": (1.5, True, 0, -5, 1 << 31),
        "stream": ("yes", 1),
        "seed": (1 << 63,),
        "stop": ([], list("abcde")),
        "personalize": ("stacked",),
        "user_id": (7, None),
        "prompt": (None,),
        "history": (-1, 17, 1.0, True, "1", "AUTO", [], "auto "),
        "words": ("yes", "AUTO", 1, 0.5, []),
    },
    ChatRequest: {
        "n": (0, 129),
        "temperature": ("1",),
        "tools": ([], [tool({"items": [{"pattern": "a{1500}"}]}), tool({"pattern": "b{1,1500}"})]),
        "tool_choice": (5, {"a": 1 << 64}),
        "response_format": (
            *({"type": "text", "a": 1 << 64}, {"type": "structural_tag"}, {"type": "json_schema"}),
            json_schema({"enum": ["x" * MAX_BYTES]}),
            *(json_schema({"properties": {"a": {"pattern": pattern}}}) for pattern in (*ENDLESS, *BEYOND)),
            json_schema({"patternProperties": {BEYOND[0]: {}}}),
            json_schema({"patternProperties": {pattern: {} for pattern in ENDLESS}}),
            json_schema({"properties": {str(n): {} for n in range(201)}, "minProperties": 1}),
        ),
        "structured_outputs": (
            *({}, 5, {"grammar": 'root ::= "a"'}, {"regex": "a", "choice": ["a"]}, {"json": {"a": 1 << 64}}),
            *({"regex": pattern} for pattern in (*ENDLESS, *BEYOND)),
            *({"json": {"properties": {"a": {"pattern": pattern}}}} for pattern in (*ENDLESS, *BEYOND)),
            {"json": {"properties": {str(n): {} for n in range(201)}, "minProperties": 1}},
            {"choice": ["x" * MAX_BYTES]},
        ),
        "stop_token_ids": (5, [1] * 65),
        "chat_template_kwargs": (5, {"thinking": [1]}, {"thinking": "x" * 257}, {"thinking": 1 << 64}),
        "max_completion_tokens": (1 << 31,),
        "stream_options": ({"include_usage": True},),
        "strength": (0.33, 1.05, -0.05, "1", True),
        "user": ("a b",),
        "history": (17,),
        "words": ("true", 0),
        "messages": ([],),
    },
    CompletionRequest: {
        "prompt": ("", [], [""], [[]], ["a", 1], [True], [-1], [1 << 31], [[1], "a"], 5, {"a": 1}, ["a"] * 129),
    },
}
WITHIN: Sequence[tuple[Any, dict[str, Any], str]] = [
    (GenerateRequest, {"stop": [""]}, "stop.0"),
    (GenerateRequest, {"messages": [{"role": "user", "content": "x"}]}, "prompt"),
    (GenerateRequest, {"prompt": None, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    (GenerateRequest, {"prompt": None, "messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
    (ChatRequest, {"logit_bias": {"5": 101}}, "logit_bias.5"),
    (ChatRequest, {"tools": [{"type": "function"}]}, "tools.0.function"),
    (
        ChatRequest,
        {"tools": [TOOL | {"function": {"name": "f", "parameters": {"a": 1 << 64}}}]},
        "tools.0.function.parameters",
    ),
    (ChatRequest, {"messages": [{"role": "user"}]}, "messages.0"),
    (ChatRequest, {"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content"),
    (ChatRequest, {"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages.0.audio"),
    *(
        (ChatRequest, {"structured_outputs": {name: value}}, f"structured_outputs.{name}")
        for name, value in (("json", "{}"), ("regex", ""), ("choice", []), ("json_object", False), ("lark", "x"))
    ),
    (CompletionRequest, {"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice.1"),
    (ChatRequest, {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "structured_outputs"),
    *((ChatRequest, {"stop_token_ids": [id_]}, "stop_token_ids.0") for id_ in (-1, 1 << 31, "a")),
    (ChatRequest, {"min_tokens": 2}, "min_tokens"),
    (ChatRequest, {"min_tokens": 3, "max_tokens": 5, "max_completion_tokens": 2}, "min_tokens"),
    (CompletionRequest, {"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    (CompletionRequest, {"prompt": ["a"] * 65, "n": 2}, "prompt"),
    *(
        (CompletionRequest, {"prompt": prompt, "echo": True, "logprobs": 0}, "echo")
        for prompt in ([1] * 513, ["a", "ä" * 257], [[1], [1] * 513])
    ),
]
"""Values that are wrong somewhere within, or only together, and what the error names."""


@pytest.mark.parametrize(
    ("model", "extra", "param"),
    [
        *((model, {name: value}, name) for model in WRONG for name in WRONG[model] for value in WRONG[model][name]),
        *WITHIN,
    ],
)
def test_other_values_are_refused_by_name(model: type[BaseModel], extra: dict[str, Any], param: str) -> None:
    error = fault(model, extra)
    assert error.param == param
    assert extra.keys() != {"history"} or "from 0 to 16, or auto" in error.message


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        (ChatRequest, {"messages": [SECRET], "stream_options": {"include_usage": True}}),
        (ChatRequest, {"messages": [SECRET], "min_tokens": 2}),
        (GenerateRequest, {"prompt": SECRET["content"], "messages": [SECRET]}),
    ],
)
def test_fields_that_do_not_go_together_echo_no_body(model: type[BaseModel], extra: dict[str, Any]) -> None:
    assert SECRET["content"] not in fault(model, extra).message


def test_the_message_shows_the_value_but_never_all_of_a_long_one() -> None:
    assert "-5" in fault(GenerateRequest, {"max_tokens": -5}).message
    message = fault(GenerateRequest, {"user_id": "x" * 100_000}).message
    assert "xxx" in message
    assert len(message) < 3 * MAX_SHOWN_CHARS


def test_a_million_wrong_items_are_one_finding() -> None:
    with pytest.raises(ValidationError) as caught:
        ItemsRequest.model_validate({"items": [0] * 1_000_000})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_is_ignored_is_taken_whatever_it_holds(name: str) -> None:
    for value in (True, {"a": [1]}, "auto"):
        found = ChatRequest.model_validate(CHAT | {name: value})
        assert found.model_dump() == ChatRequest.model_validate(CHAT).model_dump()
        assert found.ignored == (name,)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_steers_the_engine_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest.model_validate(CHAT | {name: None})
    assert (caught.value.param, caught.value.code) == (name, "refused_field")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (GenerateRequest, ("model", "vllm_xargs", "return_token_ids")),
        (ChatRequest, ("return_token_ids", "guided_json", "echo", "user_id", "prompt", "bad_words")),
        (
            CompletionRequest,
            (
                *("return_token_ids", "prompt_logprobs", "history", "tools", "messages", "max_completion_tokens"),
                "chat_template_kwargs",
            ),
        ),
    ],
)
def test_what_is_unknown_is_refused_by_name(model: type[BaseModel], names: Sequence[str]) -> None:
    for name in names:
        error = fault(model, {name: 1})
        assert (error.param, error.code) == (name, "unknown_field")


@pytest.mark.parametrize("name", ["model", "vllm_xargs", "return_token_ids"])
def test_what_is_unknown_is_refused_by_name_even_as_null(name: str) -> None:
    error = fault(GenerateRequest, {name: None})
    assert (error.param, error.code) == (name, "unknown_field")


@pytest.mark.parametrize("name", ["temperature", "guided_json", "store"])
def test_null_is_not_set_in_openais_requests(name: str) -> None:
    found = ChatRequest.model_validate(CHAT | {name: None})
    assert (found.engine_fields, found.ignored) == ({}, ())


STRUCTURES = {"json": {"type": "array", "maxItems": 9999}, "regex": "a{128}", "choice": ["a", "b"], "json_object": True}
PASSED: dict[str, Any] = {
    **{"temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["END"], "seed": 7, "logprobs": True, "top_logprobs": 3},
    **{"presence_penalty": -0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": -100.0}},
    **{"top_k": 7, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True, "skip_special_tokens": False},
    "stop_token_ids": [0, (1 << 31) - 1],
    **{"max_tokens": 9, "max_completion_tokens": 8, "tools": [TOOL], "parallel_tool_calls": False},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [None]}}},
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "chat_template_kwargs": {"enable_thinking": False, "thinking": "low", "budget": 1.5},
}


def test_what_is_passed_on_is_passed_as_it_came() -> None:
    known = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert PASSED.keys() | {"echo", "structured_outputs"} == known - OWN_FIELDS
    for asked in (PASSED, *({"structured_outputs": {name: value}} for name, value in STRUCTURES.items())):
        assert ChatRequest.model_validate(CHAT | asked).engine_fields == asked
    of_texts: dict[str, Any] = {"echo": True, "logprobs": 2}
    assert CompletionRequest.model_validate({"prompt": "hi"} | of_texts).engine_fields == of_texts


def test_nothing_is_passed_that_was_not_sent_and_null_is_nothing() -> None:
    request = ChatRequest.model_validate(CHAT | dict.fromkeys(PASSED) | {"model": None, "user": None, "stream": None})
    assert (request.engine_fields, request.model, request.stream) == ({}, "mta", False)


def test_null_is_not_set_in_structures_and_arguments() -> None:
    fields = {"structured_outputs": {"json": None, "regex": "a"}, "chat_template_kwargs": {"thinking": None}}
    assert ChatRequest.model_validate(CHAT | fields).engine_fields == {
        "structured_outputs": {"regex": "a"},
        "chat_template_kwargs": {},
    }


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


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": ["a" * 512, "b"], "echo": True, "logprobs": 0},
        {"prompt": [1] * 512, "echo": True, "logprobs": 0},
        {"prompt": [1] * 513, "echo": True},
        {"prompt": [1] * 513, "echo": False, "logprobs": 5},
    ],
)
def test_a_prompt_is_echoed_with_logprobs_when_it_is_short(asked: dict[str, Any]) -> None:
    assert CompletionRequest.model_validate(asked).engine_fields.keys() == asked.keys() - {"prompt"}


@pytest.mark.parametrize("pattern", ["a{128}", "[{]200}", r"\{200}", "a{3}{70}", "(a{15}){15}", "^a{0,128}b{128,}$"])
def test_patterns_whose_counts_are_within_bounds_are_taken(pattern: str) -> None:
    ChatRequest.model_validate(CHAT | {"response_format": json_schema({"pattern": pattern, "maxLength": 9999})})


def test_prompts_are_texts_or_token_ids_and_at_most_128_answers() -> None:
    for prompt in ("a", ["a"], ["a", "b"], [1, 2], [[1], [2, 3]], ["a"] * 64, [1] * 500):
        assert CompletionRequest.model_validate({"prompt": prompt, "n": 2}).prompt == prompt


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        (r"^\d{4}-\d{2}-\d{2}$", 10),
        ("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", 36),
        (r"^(\([0-9]{3}\))?[0-9]{3}-[0-9]{4}$", 13),
        (r"[\]{2}]{3}", 3),
        ("((ab){2,}c|d)*x{0}", 6),
        (")a{99999999999}", 1_000_001_999),
    ],
)
def test_pattern_states_equal_those_of_written_out_repeats(pattern: str, states: int) -> None:
    assert states_of(pattern) == states
    accepted = states < 100
    with nullcontext() if accepted else pytest.raises(ValidationError, match="must have patterns that repeat"):
        body = {"messages": [{"role": "user", "content": "hi"}], "response_format": json_schema({"pattern": pattern})}
        ChatRequest.model_validate(body)


@pytest.mark.parametrize(
    ("part", "times", "is_too_much"),
    [("[", 60_000, False), ("[a", 30_000, False), ("{1", 30_000, True), ("a{999999999}", 5000, True)],
)
def test_a_pattern_that_is_hard_to_read_is_read_in_one_pass(part: str, times: int, is_too_much: bool) -> None:
    assert (states_of(part * times) > MAX_STATES) is is_too_much
