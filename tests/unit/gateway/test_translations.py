"""Responses and Messages: what they become as chat requests, and what chat answers become as theirs."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

from server.errors import EngineFailed, InvalidRequest, TooMany, Unavailable
from server.gateway.experiments.arms import Level
from server.gateway.generation.personalizer import Personalization
from server.gateway.generation.prompts import UserPrompt
from server.gateway.http.errors import fault_of
from server.gateway.routes.openai.messages import MessagesError, MessagesRequest, MessagesResponse
from server.gateway.routes.openai.requests import TranslatedRequest
from server.gateway.routes.openai.responses import ResponsesRequest, ResponsesResponse
from tests.support.documented import ROOT

OF_RESPONSES: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
OF_MESSAGES: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
USER, FINE = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}


def chat(model: type[TranslatedRequest], **fields: Any) -> dict[str, Any]:
    """The chat request, without its model."""
    return model.model_validate(fields).chat.model_dump(exclude_unset=True, exclude={"model"})


def item(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "id": "x", "status": "completed", **fields}


def part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, "annotations": [], "cache_control": None}


def block(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "cache_control": {"type": "ephemeral"}, **fields}


def test_items_become_turns_joined_for_each_side() -> None:
    given = [
        {"role": "developer", "content": "be kind"},
        item("message", role="user", content=[part("input_text", "hello"), part("input_text", "you")]),
        item("reasoning", summary=[], content=[part("reasoning_text", "hm")]),
        item("message", role="assistant", content=[part("output_text", "let me look")], phase=None),
        item("function_call", call_id="c1", name="look", arguments='{"at": "sea"}', namespace=None),
        item("function_call", call_id="c2", name="look", arguments="{}"),
        item("function_call_output", call_id="c1", output="waves"),
        item("function_call_output", call_id="c2", output=[part("input_text", "rye")]),
    ]
    second = CALL | {"id": "c2", "function": {"name": "look", "arguments": "{}"}}
    assert chat(ResponsesRequest, input=given, instructions="speak")["messages"] == [
        {"role": "system", "content": "speak\n\nbe kind"},
        {"role": "user", "content": "hello\nyou"},
        {"role": "assistant", "content": "let me look", "reasoning": "hm", "tool_calls": [CALL, second]},
        {"role": "tool", "tool_call_id": "c1", "content": "waves"},
        {"role": "tool", "tool_call_id": "c2", "content": "rye"},
    ]


def test_blocks_become_turns_with_results_before_what_is_said() -> None:
    used = block("tool_use", id="c1", name="look", input={"at": "sea"})
    given = [
        USER,
        {
            "role": "assistant",
            "content": [block("thinking", thinking="hm", signature=""), block("text", text="a"), used],
        },
        {
            "role": "user",
            "content": [block("text", text="so?"), block("tool_result", tool_use_id="c1", content="waves")],
        },
        {"role": "user", "content": "well?"},
    ]
    assert chat(MessagesRequest, messages=given, max_tokens=5, system=[block("text", text="be kind")]) == {
        "max_tokens": 5,
        "messages": [
            {"role": "system", "content": "be kind"},
            USER,
            {"role": "assistant", "content": "a", "reasoning": "hm", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "waves"},
            {"role": "user", "content": "so?\n\nwell?"},
        ],
    }


SHARED = {
    **{"user": "rosa", "history": 2, "strength": 0.5, "words": False, "personalize": "merged", "learn": True},
    **{"temperature": 0.5, "top_p": 0.5, "top_k": 5, "seed": 7, "stream": True},
}
FUNCTION = {"type": "function", "function": {"name": "look", "description": "d", "parameters": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (SHARED, SHARED),
        ({"max_output_tokens": 9, "parallel_tool_calls": False}, {"max_tokens": 9, "parallel_tool_calls": False}),
        ({"text": {"format": {"type": "text"}}}, {"response_format": {"type": "text"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}, "verbosity": "low"}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}},
        ),
        (
            {"tools": [{"type": "function"} | FUNCTION["function"] | {"strict": True}], "tool_choice": "required"},
            {"tools": [{"type": "function", "function": FUNCTION["function"] | {"strict": True}}]}
            | {"tool_choice": "required"},
        ),
        ({"tool_choice": {"type": "function", "name": "look"}}, {"tool_choice": NAMED}),
        ({"tools": [], "tool_choice": "auto", "store": False, "background": None}, {}),
    ],
)
def test_fields_of_responses_become_those_of_chat(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert chat(ResponsesRequest, input="hello", **fields) == {"messages": [USER], **wanted}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (SHARED, SHARED),
        ({"metadata": {"user_id": "rosa"}}, {"user": "rosa"}),
        ({"metadata": {"user_id": "ada"}, "user": "rosa"}, {"user": "rosa"}),
        ({"stop_sequences": ["x"]}, {"stop": ["x"]}),
        (
            {"tools": [{"name": "look", "description": "d", "input_schema": PARAMETERS, "cache_control": {}}]}
            | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tools": [FUNCTION], "tool_choice": "required", "parallel_tool_calls": False},
        ),
        ({"tool_choice": {"type": "tool", "name": "look"}}, {"tool_choice": NAMED}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        ({"tool_choice": {"type": "auto"}, "system": None}, {}),
    ],
)
def test_fields_of_messages_become_those_of_chat(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    made = chat(MessagesRequest, messages=[USER], max_tokens=5, **fields)
    assert made == {"messages": [USER], "max_tokens": 5, **wanted}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (ResponsesRequest, ["reasoning", "truncation", "metadata", "service_tier", "include", "safety_identifier"]),
        (MessagesRequest, ["thinking", "service_tier", "cache_control"]),
    ],
)
def test_hints_are_ignored_and_listed(model: type[TranslatedRequest], names: Sequence[str]) -> None:
    needed = {"input": "x"} if model is ResponsesRequest else {"messages": [USER], "max_tokens": 5}
    found = model.model_validate(needed | dict.fromkeys(names, "auto"))
    assert sorted(found.ignored) == sorted(names)


@pytest.mark.parametrize(
    ("model", "section"), [(ResponsesRequest, "Responses"), (MessagesRequest, "Anthropic's Messages")]
)
def test_the_page_lists_every_field(model: type[TranslatedRequest], section: str) -> None:
    page = (ROOT / "docs/openai.md").read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`.*?) \|", page, re.MULTILINE)
    named = {name for names in rows for name in re.findall(r"`(\w+)`", names)}
    own = model.model_fields.keys() - TranslatedRequest.model_fields.keys()
    assert named >= own | model.HINTS
    assert named <= model.model_fields.keys() | model.HINTS


IMAGE, DOCUMENT = {"type": "input_image", "image_url": "x"}, {"type": "document", "source": {}}
SCHEMA = {"properties": {"a": {"pattern": "a{1500}"}}}


def fault(model: type[TranslatedRequest], fields: Mapping[str, Any]) -> InvalidRequest:
    try:
        model.model_validate(fields)
    except ValidationError as error:
        return fault_of(error.errors())
    except InvalidRequest as error:
        return error
    raise AssertionError("it was taken")


@pytest.mark.parametrize(
    ("fields", "param", "shown"),
    [
        ({"input": []}, "input", "[]"),
        ({"input": 5}, "input", "5"),
        ({"input": [{"role": "user", "content": [part("input_text", "x"), IMAGE]}]}, "input.0", "'input_image'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0", "'tool'"),
        ({"input": ["x"]}, "input.0", "'x'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "nothing is stored"),
        ({"store": True}, "store", "nothing is stored"),
        ({"previous_response_id": "resp-1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": {"id": "c"}}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "nothing is stored"),
        ({"include": ["message.output_text.logprobs"]}, "include", "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "2"),
        ({"messages": [USER]}, "messages", "unknown"),
        ({"cache_salt": "x"}, "cache_salt", "engine"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search'"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools.0.parameters", "[]"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format", "'grammar'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "0"),
    ],
)
def test_responses_are_refused_by_name_and_value(fields: dict[str, Any], param: str, shown: str) -> None:
    error = fault(ResponsesRequest, {"input": "hello"} | fields)
    assert error.param == param
    assert shown in error.message


@pytest.mark.parametrize(
    ("fields", "param", "shown"),
    [
        ({"max_tokens": None}, "max_tokens", "required"),
        ({"messages": []}, "messages", "[]"),
        ({"messages": [{"role": "user", "content": [DOCUMENT]}]}, "messages.0", "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0", "'tool_use'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "'tool'"),
        ({"messages": [USER, FINE]}, "messages", "continued"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "[]"),
        ({"system": [{"type": "image"}]}, "system", "'image'"),
        ({"metadata": {"user_id": "a b"}}, "metadata.user_id", "'a b'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0", "'bash_20250124'"),
        ({"tools": [{"name": "", "input_schema": {}}]}, "tools.0.name", "''"),
        ({"tools": [{"name": "f", "input_schema": {"a": 1 << 64}}]}, "tools.0.input_schema", "64 bits"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type", "'maybe'"),
        ({"container": "c"}, "container", "unknown"),
    ],
)
def test_messages_are_refused_by_name_and_value(fields: dict[str, Any], param: str, shown: str) -> None:
    error = fault(MessagesRequest, {"messages": [USER], "max_tokens": 5} | fields)
    assert error.param == param
    assert shown in error.message


def answer(values: Sequence[dict[str, Any]]) -> Any:
    """A generation whose engine says these values."""

    async def pieces() -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for value in values:
            yield "", value

    return SimpleNamespace(
        request=SimpleNamespace(learnt=None),
        sampling={"temperature": 0.2},
        pieces=pieces,
        public_id="id-1",
        personalization=Personalization(Level.BASE),
        prompt=UserPrompt([], 0, None, None),
        stream=SimpleNamespace(
            first=None, moved=0, usage={"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        ),
        timings=SimpleNamespace(ms={}),
    )


def responding(model: type[TranslatedRequest]) -> Any:
    nothing: Any = None
    if model is ResponsesRequest:
        return ResponsesResponse(nothing, nothing, ResponsesRequest(input="hello"))  # type: ignore[arg-type]
    return MessagesResponse(nothing, nothing, MessagesRequest(messages=[USER], max_tokens=5))


async def whole(model: type[TranslatedRequest], message: dict[str, Any], reason: str, **choice: Any) -> Any:
    value = {"choices": [{"index": 0, "message": message, "finish_reason": reason, **choice}]}
    return json.loads(await responding(model).whole(answer([value])))


async def streamed(model: type[TranslatedRequest], deltas: Sequence[dict[str, Any]], reason: str) -> list[Any]:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    sent = b"".join([event async for event in responding(model).events(answer([*chunks, last, {"choices": []}]))])
    found = re.findall(r"event: (.+)\ndata: (.+)\n\n", sent.decode())
    values = [json.loads(data) for _, data in found]
    assert [name for name, _ in found] == [value["type"] for value in values]
    return values


def cut(text: str, draw: Any) -> list[str]:
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=4)) | {0, len(text)})
    return [text[start:end] for start, end in pairwise(places)]


@st.composite
def deltas_of(draw: Any, message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as an engine streams it, in pieces of any size."""
    found: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for name in ("reasoning", "content"):
        found += [{name: piece} for piece in cut(message.get(name, ""), draw)]
    for index, call in enumerate(message.get("tool_calls", ())):
        function = {"name": call["function"]["name"], "arguments": ""}
        found.append({"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": function}]})
        for piece in cut(call["function"]["arguments"], draw):
            found.append({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    return found


SAID = st.sampled_from(
    [
        {"content": "up early"},
        {"content": ""},
        {"content": "let me look", "tool_calls": [CALL, CALL | {"id": "c2"}]},
        {"reasoning": "hm", "content": "up early"},
        {"reasoning": "hm", "tool_calls": [CALL]},
    ]
)


def blocks_of(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The ids of a message's calls, or the names of its other fields, each with its text."""
    found = [(name, message[name]) for name in ("reasoning", "content") if message.get(name)]
    found += [(call["id"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return found or [("content", "")]


MOVING = {"created_at", "completed_at", "id"}  # by the clock, or by the request


def same(value: Any) -> Any:
    """A value without what differs from one request to the next."""
    if isinstance(value, dict):
        return {name: same(inner) for name, inner in value.items() if name not in MOVING}
    return [same(inner) for inner in value] if isinstance(value, list) else value


def said_in(item: Mapping[str, Any]) -> str:
    return item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]


@settings(max_examples=25, deadline=None)
@given(st.data(), SAID, st.sampled_from(["stop", "length", "tool_calls"]))
async def test_a_response_is_the_same_in_any_chunks(data: Any, message: dict[str, Any], reason: str) -> None:
    one = await whole(ResponsesRequest, message, reason)
    events = await streamed(ResponsesRequest, data.draw(deltas_of(message)), reason)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        OF_RESPONSES.validate_python(event)
    kinds = {"message": "content", "reasoning": "reasoning"}
    made = [(item.get("call_id") or kinds[item["type"]], said_in(item)) for item in one["output"]]
    assert made == blocks_of(message)
    last = events[-1]
    assert last["type"] == f"response.{'incomplete' if reason == 'length' else 'completed'}"
    assert same(last["response"]) == same(one)
    for index, made in enumerate(last["response"]["output"]):
        told = [event for event in events if event.get("output_index") == index]
        assert (told[0]["type"], told[-1]["type"]) == ("response.output_item.added", "response.output_item.done")
        assert told[-1]["item"] == made
        assert "".join(event["delta"] for event in told if "delta" in event) == said_in(made)
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places)


@settings(max_examples=25, deadline=None)
@given(st.data(), SAID, st.sampled_from(["stop", "length", "tool_calls"]))
async def test_a_message_is_the_same_in_any_chunks(data: Any, message: dict[str, Any], reason: str) -> None:
    one = await whole(MessagesRequest, message, reason)
    start, *events, last = await streamed(MessagesRequest, data.draw(deltas_of(message)), reason)
    for event in (start, *events, last):
        OF_MESSAGES.validate_python(event)
    content: list[Any] = []
    for event in events:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": begun}:
                assert index == len(content)
                content.append(begun | {"partial": ""})
            case {"type": "content_block_delta", "index": index, "delta": {"type": _, **more}}:
                assert index == len(content) - 1
                ((name, text),) = more.items()
                content[-1]["partial" if name == "partial_json" else name] += text
    kinds = {"text": "content", "thinking": "reasoning"}
    texts = [made["partial"] or made.get("text") or made.get("thinking", "") for made in content]
    names = [made.get("id") or kinds[made["type"]] for made in content]
    assert list(zip(names, texts, strict=True)) == blocks_of(message)
    for made in content:
        partial = made.pop("partial")
        if partial:
            made["input"] = json.loads(partial)
    assert start["message"] | {"content": content, "usage": last["usage"]} | last["delta"] == one


async def test_answers_have_all_fields_that_the_clients_demand() -> None:
    message = {"reasoning": "hm", "content": "x", "tool_calls": [CALL]}
    Response.model_validate(await whole(ResponsesRequest, message, "stop"), strict=True)
    Message.model_validate(await whole(MessagesRequest, message, "stop"), strict=True)


@pytest.mark.parametrize(
    ("message", "reason", "stop", "found"),
    [
        ({"content": "x"}, "stop", None, ("end_turn", None)),
        ({"content": "x"}, "stop", 151645, ("end_turn", None)),
        ({"content": "x"}, "stop", "END", ("stop_sequence", "END")),
        ({"content": "x"}, "length", None, ("max_tokens", None)),
        ({"tool_calls": [CALL]}, "tool_calls", None, ("tool_use", None)),
        ({"tool_calls": [CALL]}, "stop", None, ("tool_use", None)),
    ],
)
async def test_a_message_says_why_it_stopped(message: Any, reason: str, stop: Any, found: Any) -> None:
    made = await whole(MessagesRequest, message, reason, stop_reason=stop)
    assert (made["stop_reason"], made["stop_sequence"]) == found


@pytest.mark.parametrize("arguments", ["", '{"at": "se', "[1]"])
async def test_arguments_that_are_no_object_are_none_in_a_message(arguments: str) -> None:
    call = CALL | {"function": {"name": "look", "arguments": arguments}}
    made = await whole(MessagesRequest, {"tool_calls": [call]}, "length")
    assert made["content"][0]["input"] == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("x"), "invalid_request_error"),
        (TooMany("x"), "rate_limit_error"),
        (Unavailable("x"), "overloaded_error"),
        (EngineFailed("x"), "api_error"),
    ],
)
def test_errors_of_messages_have_anthropics_types(error: Any, kind: str) -> None:
    assert MessagesError.of(error).error == {"type": kind, "message": "x", "details": {"error_code": error.code}}


async def test_a_failure_ends_the_events() -> None:
    failed = responding(ResponsesRequest).failure(EngineFailed("x"))
    value = json.loads(failed.partition(b"data: ")[2])
    OF_RESPONSES.validate_python(value)
    assert (value["type"], value["response"]["status"]) == ("response.failed", "failed")
    assert value["response"]["error"]["message"] == "x"
    failed = responding(MessagesRequest).failure(EngineFailed("x"))
    assert failed.startswith(b"event: error\ndata: ")
