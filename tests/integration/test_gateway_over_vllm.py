"""The gateway over a real vLLM: OpenAI's Python and npm clients, unchanged but for their base URL, and heavy load."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from bank.items.prompt import answer_ids
from bank.lookup.phrases import phrase_table
from bench.fleet.overload import Overload
from bench.fleet.streams import Load
from bench.rig.engine import Engine
from bench.rig.valkey import free_port
from server.settings import Settings
from tests.support.calls import BOTH, either, error_of, put, who
from tests.support.gateway import GatewayThread, chunks_of, generate, give_phrases, serving, text_of
from tests.support.node import names_of, run_tests

HELLO = [{"role": "user", "content": "hello there"}]
MODULE = Path(__file__).with_name("openai_npm.mjs")  # the tests of the npm client


@pytest.fixture(scope="module")
def client(gateway_over_vllm: GatewayThread) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway_over_vllm.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_users_get_answers_of_their_own(client: OpenAI, gateway_over_vllm: GatewayThread) -> None:
    texts, options = {}, {"messages": HELLO, "temperature": 0}
    for user in ("rosa", "kai", "nobody"):
        answer = client.chat.completions.create(model="mta", user=user, max_completion_tokens=24, **options)
        texts[user] = answer.choices[0].message.content
        assert (answer.model, answer.object) == ("mta", "chat.completion")
        assert answer.personalization["level"] == ("base" if user == "nobody" else "merged")
    assert len(set(texts.values())) == 3
    base = client.chat.completions.create(model="base", user="rosa", max_tokens=24, **options)
    assert base.choices[0].message.content == texts["nobody"]
    with gateway_over_vllm.client() as plain:
        answer = plain.post("/generate", json={"user_id": "rosa", "max_tokens": 24, **options})
        assert answer.json()["text"] == texts["rosa"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_user_repeats_is_said(gateway_over_vllm: GatewayThread, tiny_model_folder: Path, stream: bool) -> None:
    ids = answer_ids(AutoTokenizer.from_pretrained(tiny_model_folder), ["ahoy, mate"])  # with the end of turn
    with gateway_over_vllm.client() as plain:
        put(plain, "sailor")
        asyncio.run(give_phrases(gateway_over_vllm, "sailor", phrase_table(ids * 2).tobytes()))
        asked = {"max_tokens": 24, "temperature": 0, "stream": stream}
        said, unsaid = (generate(plain, "sailor", words=words, **asked).raise_for_status() for words in (True, False))
    if stream:
        *chunks, last, _ = chunks_of(said)
        assert (text_of(chunks), last["moved"]) == ("ahoy, mate", 11)
    else:
        assert (said.json()["text"], who(said)["moved"]) == ("ahoy, mate", 11)
    assert "ahoy" not in unsaid.text


LOOK = {"where": {"enum": ["sea", "mill"]}, "high": {"type": "boolean"}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": LOOK, **more}}}
    for name, more in (("wait", {}), ("look", {"required": list(LOOK), "additionalProperties": False}))
]
NAMED = {"type": "function", "function": {"name": "look"}}


def called(client: OpenAI, stream: bool, **asked: Any) -> tuple[list[tuple[str, Any]], str | None, str]:
    """The calls of an answer to a request with tools, the finish reason, and what is said besides."""
    asked = {"model": "mta", "messages": HELLO, "tools": TOOLS, "max_tokens": 400, "seed": 1} | asked
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer: Any = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    calls = [call.function for call in choice.message.tool_calls or []]
    return [(c.name, json.loads(c.arguments)) for c in calls], choice.finish_reason, choice.message.content or ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("user", ["rosa", "nobody"])
@pytest.mark.parametrize(("choice", "reason"), [(NAMED, "stop"), ("required", "tool_calls")])
def test_a_forced_call_follows_its_schema(client: OpenAI, choice: Any, reason: str, user: str, stream: bool) -> None:
    # A random model likes white space, and calls more than once: not when it is hot, or told so.
    asked = {"tools": TOOLS[1:], "tool_choice": choice, "temperature": 1, "parallel_tool_calls": False}
    ((name, arguments),), found, said = called(client, stream, user=user, **asked)
    assert (name, found, said) == ("look", reason, "")
    assert set(arguments) == set(LOOK) and arguments["where"] in LOOK["where"]["enum"]


def test_a_call_is_likelier_than_what_a_person_repeats(
    client: OpenAI, gateway_over_vllm: GatewayThread, tiny_model_folder: Path
) -> None:
    ids = answer_ids(AutoTokenizer.from_pretrained(tiny_model_folder), ["ahoy, mate"])
    with gateway_over_vllm.client() as plain:
        put(plain, "caller")
    asyncio.run(give_phrases(gateway_over_vllm, "caller", phrase_table(ids * 2).tobytes()))
    asked: Any = {"model": "mta", "user": "caller", "messages": HELLO, "max_tokens": 1}
    for more, mixed in (({}, True), ({"tools": TOOLS}, False), ({"tools": TOOLS, "extra_body": {"words": True}}, True)):
        answer = client.chat.completions.create(**asked, **more)
        assert bool(answer.personalization["phrases"]) is mixed


@BOTH
@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"choice": ["sea", "mill"]}, "sea|mill"),
        ({"regex": "[ab]{3,5}c"}, "[ab]{3,5}c"),
        ({"json": {"type": "object", "properties": LOOK, "required": list(LOOK)}}, r"(?s)\{.*\}"),
        ({"json_object": True}, r"(?s)\{.*"),
        ({"json": {}}, "(?s).+"),
    ],
)
def test_an_answer_has_the_structure_asked_for(
    gateway_over_vllm: GatewayThread, route: str, structure: dict[str, Any], pattern: str
) -> None:
    with gateway_over_vllm.client() as plain:
        answer = either(plain, route, user="rosa", structured_outputs=structure, max_tokens=300, temperature=1, seed=1)
    (choice,) = answer.raise_for_status().json()["choices"]
    assert re.fullmatch(pattern, choice["text"] if "text" in choice else choice["message"]["content"])


@BOTH
@pytest.mark.parametrize(
    ("fields", "tokens"), [({}, 1), ({"min_tokens": 3}, 4), ({"structured_outputs": {"regex": "[a-f]+"}}, 2)]
)
def test_stop_tokens_end_an_answer(
    gateway_over_vllm: GatewayThread, tiny_model_folder: Path, route: str, fields: dict[str, Any], tokens: int
) -> None:
    (stop,) = AutoTokenizer.from_pretrained(tiny_model_folder).encode("c", add_special_tokens=False)
    asked = {"user": "rosa", "max_tokens": 9, "temperature": 0, "logit_bias": {str(stop): 100}} | fields
    with gateway_over_vllm.client() as plain:
        answer = either(plain, route, stop_token_ids=[stop], **asked).raise_for_status().json()
        refused = either(plain, route, stop_token_ids=[stop, (1 << 31) - 1], **asked)
        either(plain, route).raise_for_status()
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", stop)
    assert answer["usage"]["completion_tokens"] == tokens
    assert error_of(refused)[:2] == (400, "stop_token_ids")


def test_a_conversation_goes_on_after_a_call(client: OpenAI) -> None:
    function = {"name": "look", "arguments": '{"where": "sea"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    turns = [*HELLO, call, {"role": "tool", "tool_call_id": "c", "content": "it is calm"}]
    asked: Any = {"model": "mta", "user": "rosa", "messages": turns, "max_tokens": 4}
    for tools in ({}, {"tools": TOOLS}):
        answer = client.chat.completions.create(**asked, **tools, extra_body={"learn": True})
        assert answer.choices[0].message.content
        assert answer.personalization["learned"] is False


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_only_fields_that_openai_allows_are_null(gateway_over_vllm: GatewayThread, route: str, stream: bool) -> None:
    with gateway_over_vllm.client() as plain:
        answer = either(plain, route, user="rosa", stream=stream).raise_for_status()
    for value in chunks_of(answer)[:-1] if stream else [answer.json()]:
        value.pop("personalization", None)  # ours
        nulls = set(re.findall(r'"(\w+)": null', json.dumps(value)))
        assert nulls <= {"content", "refusal", "logprobs", "finish_reason"}


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_says_the_same_and_ends_with_its_usage(client: OpenAI, chat: bool) -> None:
    asked = {"model": "mta", "user": "rosa", "max_tokens": 24, "temperature": 0}
    asked |= {"messages": HELLO} if chat else {"prompt": "hello there"}
    create = client.chat.completions.create if chat else client.completions.create
    whole = create(**asked)
    *chunks, last = create(**asked, stream=True, stream_options={"include_usage": True})
    pieces = [(chunk.choices[0].delta.content if chat else chunk.choices[0].text) or "" for chunk in chunks]
    assert "".join(pieces) == (whole.choices[0].message.content if chat else whole.choices[0].text)
    assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert chunks[0].personalization["recipe"] == whole.personalization["recipe"]
    assert {(chunk.usage, chunk.object) for chunk in chunks} == {
        (None, "chat.completion.chunk" if chat else "text_completion")
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}, None),
    ],
)
def test_what_the_engine_refuses_is_a_bad_request(client: OpenAI, fields: dict[str, object], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "mta", "user": "rosa", "messages": HELLO} | fields)
    assert param is None or caught.value.param == param
    assert "cache_salt" not in str(caught.value)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, gateway_over_vllm: GatewayThread, gateway_settings: Settings
) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("npm")
    with GatewayThread(gateway_settings, engine_url=f"http://127.0.0.1:{free_port()}") as without_engine:
        urls = {"GATEWAY_URL": gateway_over_vllm.url, "NOWHERE_URL": without_engine.url}
        return run_tests(folder, MODULE, urls)


@pytest.mark.parametrize("name", names_of(MODULE))
def test_the_npm_client(results: Mapping[str, str], name: str) -> None:
    assert results[name] == "ok", results[name]


def test_two_gateways_bear_more_than_they_can_serve(gateway_settings: Settings, tiny_engine: Engine) -> None:
    """The short form of `mta bench overload`, whose claims about time it leaves out."""
    changes = {"engine_url": tiny_engine.url, "send_timeout_s": 1, "engine_places": 8, "queue_places": 8}
    loads: dict[str, Load] = {}
    with GatewayThread(gateway_settings, **changes) as one, GatewayThread(gateway_settings, **changes) as other:
        overload = Overload([one.url, other.url], 12, lambda what: lambda stream: None, loads)
        found = dict(asyncio.run(overload.streams(16, 1)) + asyncio.run(overload.beyond(("overload", "readers"), 1)))
    assert found["16 streams at once: lost"] == "0"
    assert found["places still taken at the end"] == "0"
    assert len(loads) == 5
    for load in loads.values():
        assert load.served
        assert not load.failures
        assert all(stream.chunks > 2 for stream in load.served)


def said(choice: dict[str, Any]) -> tuple[Any, ...]:
    """One of several answers, without what vLLM leaves empty."""
    message = {name: one for name, one in choice.get("message", {}).items() if one is not None or name == "refusal"}
    logprobs = choice["logprobs"]
    tokens = [one["token"] for one in logprobs["content"]] if message else logprobs["tokens"]
    assert message or len(logprobs["text_offset"]) == len(tokens)
    return choice["index"], choice["finish_reason"], choice.get("text"), message, tokens


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "Tell me", "logprobs": 1},
        {"prompt": ["Tell me", "Once upon"], "logprobs": 1},
        {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 2},
    ],
    ids=["one prompt", "two", "conversation"],
)
def test_wide_request_in_parts_equals_the_engines_own_answer(
    gateway_over_vllm: GatewayThread, gateway_settings: Settings, tiny_engine: Engine, asked: dict[str, Any]
) -> None:
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    asked = asked | {"max_tokens": 6, "n": 5, "seed": 11, "temperature": 1.0, "model": "base"}
    narrow = serving(gateway_settings, engine_url=tiny_engine.url, engine_places=8)
    with narrow as beside, gateway_over_vllm.client() as client:
        clients = (tiny_engine.client, client, beside)
        straight, *answers = (one.post(path, json=asked).raise_for_status().json() for one in clients)
    wanted = [said(choice) for choice in straight["choices"]]
    assert len({tuple(tokens) for *_, tokens in wanted}) > 1
    for answer in answers:
        assert [said(choice) for choice in answer["choices"]] == wanted
        assert answer["usage"]["total_tokens"] == straight["usage"]["total_tokens"]
