"""Responses and Messages through the gateway: personal, counted and refused like chat, each in its own shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from httpx import Client
from openai import OpenAI
from pydantic import BaseModel

from tests.support.calls import TRANSLATED, TURN, NewUser, ask, asked, body_of, either, error_of, give, put, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, metric, wait_until_ready

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "sea"}'}}
PARAMETERS = {"type": "object", "properties": {"place": {"enum": ["sea"]}}, "required": ["place"]}
PREFIXES = {"/v1/responses": "resp-", "/v1/messages": "msg-"}
LONGEST = {"/v1/responses": "max_output_tokens", "/v1/messages": "max_tokens"}


def text_of(route: str, answer: dict[str, Any]) -> str:
    return answer["content"][0]["text"] if route == "/v1/messages" else answer["output"][0]["content"][0]["text"]


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = re.findall(r"^event: (.+)\ndata: (.+)$", response.text, re.MULTILINE)
    return [(name, json.loads(data)) for name, data in found]


@TRANSLATED
def test_an_answer_is_as_personal_as_chats(client: Client, ada: str, fake_engine: FakeEngine, route: str) -> None:
    chat = ask(client, ada, temperature=0.5).json()
    response = either(client, route, user=ada, temperature=0.5, service_tier="auto").raise_for_status()
    answer, (first, second) = response.json(), [seen.body for seen in fake_engine.seen]
    assert (first, text_of(route, answer)) == (second, chat["choices"][0]["message"]["content"])
    found, wanted = answer["personalization"], chat["personalization"]
    assert found | {"timings_ms": 0} == wanted | {"timings_ms": 0}
    assert (response.headers["X-MTA-Level"], response.headers["X-MTA-Recipe"]) == ("merged", wanted["recipe"])
    assert response.headers["X-MTA-Ignored"] == "service_tier"
    assert response.headers["Server-Timing"].startswith("profile;dur=")
    assert (answer["id"][:4], answer["model"]) == (PREFIXES[route][:4], "mta")
    assert answer["usage"] | {"input_tokens": 5, "output_tokens": 4} == answer["usage"]


@TRANSLATED
@pytest.mark.parametrize("stream", [False, True])
def test_feedback_names_an_answer_by_its_id(client: Client, ada: str, route: str, stream: bool) -> None:
    response = either(client, route, user=ada, stream=stream).raise_for_status()
    first = events_of(response)[0][1] if stream else {"message": response.json()}
    answer = first.get("response") or first["message"]
    assert answer["personalization"]["level"] == "merged"
    assert give(client, ada, answer["id"], rating="up").status_code == httpx.codes.OK


@TRANSLATED
def test_past_items_are_quoted_and_messages_learnt(
    client: Client, new_user: NewUser, fake_engine: FakeEngine, route: str
) -> None:
    user_id = new_user()
    put(client, user_id)
    wait_until_ready(client)
    said = {"input": TURN} if route == "/v1/responses" else {"messages": [{"role": "user", "content": TURN}]}
    response = either(client, route, user=user_id, history=1, learn=True, **said)
    assert (who(response)["history"], who(response)["learned"]) == (1, True)
    assert "behind the mill" in asked(fake_engine)


@TRANSLATED
def test_the_user_may_come_in_a_header(client: Client, ada: str, route: str) -> None:
    response = client.post(route, json=body_of(route), headers={"X-User-ID": ada})
    assert who(response)["level"] == "merged"
    refused = client.post(route, json=body_of(route, user="kai"), headers={"X-User-ID": ada})
    assert refused.status_code == httpx.codes.BAD_REQUEST


@TRANSLATED
def test_more_than_the_context_leaves_is_refused_by_its_name(client: Client, route: str) -> None:
    wait_until_ready(client)
    refused = either(client, route, **{LONGEST[route]: 600})
    assert error_of(refused)[2] == "context_length_exceeded"
    assert refused.json()["error"]["message"].startswith(f"{LONGEST[route]} 600")


@TRANSLATED
def test_generations_are_counted(client: Client, route: str) -> None:
    name = 'mta_generations_total{level="base",outcome="answered",tenant="default"}'
    before = metric(client, name)
    either(client, route).raise_for_status()
    assert metric(client, name) == before + 1


@TRANSLATED
@pytest.mark.parametrize("knobs", [{"die_after": 2}, {"fail_after": 2}, {"finish_reasons": ("abort",)}])
def test_a_broken_stream_ends_in_the_formats_failure(
    client: Client, ada: str, fake_engine: FakeEngine, *, route: str, knobs: dict[str, Any]
) -> None:
    fake_engine.turn(**knobs)
    response = either(client, route, user=ada, stream=True)
    *_, (name, last) = events_of(response)
    if route == "/v1/responses":
        assert (name, last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["message"].startswith("the engine")
    else:
        assert (name, last["error"]["type"]) == ("error", "api_error")
    assert "[DONE]" not in response.text and "message_stop" not in response.text


def test_a_stream_ends_in_the_mark_of_its_format(client: Client) -> None:
    assert either(client, "/v1/responses", stream=True).text.endswith("\n\ndata: [DONE]\n\n")
    ends = either(client, "/v1/messages", stream=True)
    assert (events_of(ends)[-1][0], "[DONE]" in ends.text) == ("message_stop", False)


@pytest.mark.parametrize(
    ("method", "sent", "status", "kind"),
    [
        ("POST", {"json": {"max_tokens": 4}}, 400, "invalid_request_error"),
        ("POST", {"json": body_of("/v1/messages", model="other")}, 404, "not_found_error"),
        ("POST", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "invalid_request_error"),
        ("POST", {"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "invalid_request_error"),
        (
            "POST",
            {"content": b" " * (9 << 20), "headers": {"Content-Type": "application/json"}},
            413,
            "request_too_large",
        ),
        ("GET", {}, 405, "invalid_request_error"),
    ],
)
def test_errors_of_messages_are_anthropics(
    client: Client, method: str, sent: dict[str, Any], status: int, kind: str
) -> None:
    response = client.request(method, "/v1/messages", **sent)
    error = response.json()
    assert (response.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert error["request_id"] == response.headers["X-Request-Id"]


def test_a_full_engine_is_anthropics_overload(client: Client, fake_engine: FakeEngine) -> None:
    fake_engine.turn(status=503)
    refused = either(client, "/v1/messages")
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")


def test_no_response_is_stored(client: Client) -> None:
    answer = either(client, "/v1/responses").json()
    assert error_of(client.get(f"/v1/responses/{answer['id']}")) == (404, "response_id", "stored")
    assert answer["store"] is False


class Place(BaseModel):
    place: str


@pytest.fixture
def gpt(gateway: GatewayThread) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def claude(gateway: GatewayThread) -> Iterator[Anthropic]:
    with Anthropic(base_url=gateway.url, api_key="unused", max_retries=0, timeout=30) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_calls_functions(gpt: OpenAI, fake_engine: FakeEngine, stream: bool) -> None:
    fake_engine.turn(says={"content": "let me see", "tool_calls": [CALL]})
    tool: Any = {"type": "function", "name": "look", "parameters": PARAMETERS, "strict": True}
    if stream:
        with gpt.responses.stream(model="mta", input="where?", tools=[tool]) as streamed:
            response = streamed.get_final_response()
    else:
        response = gpt.responses.create(model="mta", input="where?", tools=[tool])
    call = response.output[1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look", {"place": "sea"})
    fake_engine.turn(says={"content": "at sea"})
    returned = {"type": "function_call_output", "call_id": call.call_id, "output": "waves"}
    said: Any = [{"role": "user", "content": "where?"}, *response.output, returned]
    assert gpt.responses.create(model="mta", input=said, tools=[tool]).output_text == "at sea"
    assert fake_engine.seen[-1].body["messages"] == [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "let me see", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "waves"},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_uses_tools(claude: Anthropic, fake_engine: FakeEngine, stream: bool) -> None:
    fake_engine.turn(says={"reasoning": "hm", "tool_calls": [CALL]})
    asked: Any = {"model": "mta", "max_tokens": 50, "tools": [{"name": "look", "input_schema": PARAMETERS}]}
    said: list[Any] = [{"role": "user", "content": "where?"}]
    if stream:
        with claude.messages.stream(messages=said, **asked) as streamed:
            answer = streamed.get_final_message()
    else:
        answer = claude.messages.create(messages=said, **asked)
    thought, used = answer.content
    assert (thought.thinking, used.name, used.input, answer.stop_reason) == ("hm", "look", {"place": "sea"}, "tool_use")
    fake_engine.turn(says={"content": "at sea"})
    result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "waves"}]}
    said += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(messages=said, **asked).content[0].text == "at sea"
    assert fake_engine.seen[-1].body["messages"][1:] == [
        {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "waves"},
    ]


def test_openais_client_parses_structured_answers(gpt: OpenAI, fake_engine: FakeEngine) -> None:
    fake_engine.turn(says={"content": '{"place": "sea"}'})
    answer = gpt.responses.parse(model="mta", input="where?", text_format=Place)
    assert answer.output_parsed == Place(place="sea")
    assert fake_engine.seen[-1].body["response_format"]["json_schema"]["schema"]["required"] == ["place"]
