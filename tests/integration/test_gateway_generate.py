"""`POST /generate` and OpenAI's routes over a fake engine: personalization, what the engine gets, streams, limits."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from httpx import Client

from adapters.recipe import parse_recipe
from bench.rig.processes import wait_until
from server.settings import Sampling, Settings
from server.store.profiles import Change
from server.store.tenants.user_key import UserKeys
from tests.support.calls import ALL, BOTH, HELLO, NewUser, ask, either, error_of, put, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import (
    SECRET,
    GatewayThread,
    chunks_of,
    generate,
    give_adapter,
    serving,
    text_of,
    wait_until_ready,
)
from tests.support.store_parts import StoreParts

STREAMED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def asking(route: str, text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if "chat" in route else {"prompt": text}


def test_a_profile_gives_the_recipe(client: Client, ada: str, fake_engine: FakeEngine, gateway: GatewayThread) -> None:
    response = generate(client, ada).raise_for_status()
    answer, merged = response.json(), who(response)
    assert (merged["level"], merged["source"], merged["reason"]) == ("merged", "topic", None)
    recipe = parse_recipe(merged["recipe"])
    assert recipe.bank == gateway.parts.bank.manifest.short
    weights = {anchor["id"]: anchor["weight"] for anchor in merged["anchors"]}
    assert weights == {f"a{term.anchor:02d}": term.weight / 1000 for term in recipe.terms}
    first, second = merged["anchors"]
    assert (first["id"], first["similarity"] > second["similarity"]) == ("a00", True)
    assert first["weight"] > second["weight"]
    assert fake_engine.seen[-1].body["model"] == merged["recipe"]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert (answer["finish_reason"], len(answer["text"].split())) == ("length", 4)
    timings = merged["timings_ms"]
    assert list(timings) == ["profile", "recipe", "engine", "total"]
    assert timings["engine"] <= timings["total"]
    assert response.headers["Server-Timing"] == ", ".join(f"{name};dur={ms}" for name, ms in timings.items())


def test_when_the_base_model_answers(client: Client, ada: str, new_user: NewUser, fake_engine: FakeEngine) -> None:
    assert error_of(generate(client, new_user(), personalize="merged")) == (404, "user_id", "not_found")
    assert fake_engine.seen == []
    base = who(generate(client, new_user()))
    assert (base["level"], base["recipe"], base["anchors"], base["reason"]) == ("base", None, [], "unknown user")
    assert fake_engine.seen[-1].body["model"] == "base"
    base = who(generate(client, ada, personalize="none"))
    assert (base["level"], base["recipe"], "profile" in base["timings_ms"]) == ("base", None, False)


async def embedded_by_another(gateway: GatewayThread, user_id: str) -> None:
    """Have a user's embeddings be those of another embedder, as after a change."""
    async with StoreParts.opened(gateway.opened.settings.redis_url) as parts:
        snapshot = await parts.profiles.read(key := gateway.key(user_id))
        assert snapshot.profile
        vectors = {name: replace(stored, embedder="00" * 8) for name, stored in snapshot.vectors.items()}
        change = Change(replace(snapshot.profile, embedder="00" * 8), {}, vectors, ())
        assert await parts.profiles.commit(key, snapshot.version, change, snapshot.epoch)


def test_an_answer_does_not_wait_for_a_new_embedder(
    client: Client, ada: str, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(embedded_by_another(gateway, ada))
    goes_on, real = threading.Event(), gateway.parts.profiles.embedder

    def embed(texts: list[str]) -> Any:
        goes_on.wait(30)
        return real.embed(texts)

    slow = SimpleNamespace(id=real.id, dim=real.dim, embed=embed)
    monkeypatch.setattr(gateway.parts.profiles, "embedder", slow)
    base = who(generate(client, ada))
    assert (base["level"], "embedded anew" in base["reason"]) == ("base", True)
    assert error_of(generate(client, ada, personalize="merged")) == (503, None, "not_embedded")
    goes_on.set()
    wait_until(lambda: who(generate(client, ada))["level"] == "merged", "the items to be embedded")


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_is_sent(client: Client, ada: str, fake_engine: FakeEngine, stream: bool) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "stop": "END", "seed": 7}
    answer = generate(client, ada, prompt="Zwölf Boxkämpfer 🥊", stream=stream, **sampling)
    seen, keys = fake_engine.seen[-1], UserKeys(SECRET, "default")
    assert seen.body == {
        "model": seen.body["model"],
        "messages": [{"role": "user", "content": "Zwölf Boxkämpfer 🥊"}],
        "max_tokens": 4,
        **sampling,
        "stop": ["END"],
        "cache_salt": keys.cache_salt,
        **(STREAMED if stream else {}),
    }
    assert seen.headers["X-Session-ID"] == seen.body["model"]
    assert seen.headers["X-Request-ID"] in answer.text
    sent = json.dumps(seen.body) + json.dumps(seen.headers)
    assert ada not in sent and keys.key(ada) not in sent


@ALL
def test_the_engine_streams_an_answer_that_may_not_fit(client: Client, fake_engine: FakeEngine, route: str) -> None:
    wait_until_ready(client)
    for chars, streamed in ((40, False), (200, True)):
        either(client, route, **asking(route, "x" * chars), max_tokens=100).raise_for_status()
        assert fake_engine.seen[-1].body.get("stream", False) is streamed


def test_the_engine_parses_tool_calls_in_one_piece(client: Client, fake_engine: FakeEngine) -> None:
    wait_until_ready(client)
    fields = {"tools": [{"type": "function", "function": {"name": "look"}}], "tool_choice": "required"}
    for more in ({"n": 2}, {"max_tokens": 500}):
        ask(client, **fields, **more).raise_for_status()
        assert "stream" not in fake_engine.seen[-1].body


def test_a_stream_says_the_same_as_a_whole_answer(client: Client, ada: str) -> None:
    whole, response = generate(client, ada).json(), generate(client, ada, stream=True)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *chunks, done = chunks_of(response)
    first, last = chunks[0], chunks[-1]
    assert (done, text_of(chunks)) == ("[DONE]", whole["text"])
    assert {(chunk["object"], chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        ("chat.completion.chunk", first["id"], first["created"], whole["personalization"]["recipe"])
    }
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["personalization"] | {"timings_ms": 0} == whole["personalization"] | {"timings_ms": 0}
    assert list(first["personalization"]["timings_ms"]) == ["profile", "recipe", "engine_ttft"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last["usage"] == whole["usage"]
    assert list(last["timings_ms"]) == ["profile", "recipe", "engine_ttft", "engine", "total"]
    named = {part.partition(";")[0] for part in response.headers["Server-Timing"].split(", ")}
    assert named == {"profile", "recipe", "engine_ttft"}


def test_tokens_are_streamed_as_the_engine_sends_them(client: Client, ada: str, fake_engine: FakeEngine) -> None:
    fake_engine.knobs.token_delay_s = 0.05
    body = {"user_id": ada, "prompt": "hello", "max_tokens": 40, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        next(line for line in response.iter_lines() if "content" in line and '"content":""' not in line)
        assert fake_engine.seen[-1].tokens < 40


@ALL
@pytest.mark.parametrize("stream", [False, True])
def test_more_tokens_than_the_prompt_leaves_are_refused(
    client: Client, fake_engine: FakeEngine, route: str, stream: bool
) -> None:
    wait_until_ready(client)  # from now on the gateway knows the engine's context of 512
    asked = asking(route, "x" * 500)
    assert either(client, route, **asked, max_tokens=12, stream=stream).status_code == 200
    fake_engine.knobs.token_delay_s = 0.05
    refused = either(client, route, **asked, max_tokens=13, stream=stream)
    assert error_of(refused) == (400, "max_tokens", "context_length_exceeded")
    assert "Ask for at most 12" in refused.json()["error"]["message"]
    wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to be told")


def test_a_chat_completion_is_openais_plus_personalization(client: Client, ada: str, fake_engine: FakeEngine) -> None:
    response = ask(client, ada).raise_for_status()
    answer, mine = response.json(), generate(client, ada).json()
    merged = answer.pop("personalization")
    assert merged | {"timings_ms": 0} == mine["personalization"] | {"timings_ms": 0}
    assert answer.pop("id").partition(".")[0] == fake_engine.seen[0].headers["X-Request-ID"]
    message = {"role": "assistant", "content": mine["text"]}
    assert answer == {
        "object": "chat.completion",
        "created": 1790000000,
        "model": "mta",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9},
    }
    assert (response.headers["X-MTA-Level"], response.headers["X-MTA-Recipe"]) == ("merged", merged["recipe"])
    assert response.headers["Server-Timing"].startswith("profile;dur=")


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_names_the_engines_model_or_the_users_key(
    client: Client, ada: str, fake_engine: FakeEngine, gateway: GatewayThread, *, route: str, stream: bool
) -> None:
    fake_engine.knobs.user_adapters = True
    asyncio.run(give_adapter(gateway, ada))
    response = either(client, route, user=ada, stream=stream).raise_for_status()
    assert ":u-" in fake_engine.seen[-1].body["model"]
    told = response.text + json.dumps(dict(response.headers))
    assert [name for name in (gateway.key(ada), "kv_transfer_params", ":u-") if name in told] == []
    assert response.headers["X-MTA-Level"] == "stacked"


def test_there_are_two_models_and_recipes_are_none(client: Client, ada: str) -> None:
    models = client.get("/v1/models").raise_for_status().json()
    assert (models["object"], [model["id"] for model in models["data"]]) == ("list", ["mta", "base"])
    assert all(model.keys() == {"id", "object", "created", "owned_by"} for model in models["data"])
    assert [client.get(f"/v1/models/{name}").json() for name in ("mta", "base")] == models["data"]
    recipe = who(generate(client, ada))["recipe"]
    refused = [client.get(f"/v1/models/{name}") for name in (recipe, "gpt-4", "meta-llama%2FLlama")]
    refused += [ask(client, ada, model=name) for name in (recipe, "gpt-4", "")]
    assert {error_of(answer) for answer in refused} == {(404, "model", "model_not_found")}


@BOTH
def test_the_base_model_answers_on_request_and_without_a_user(
    client: Client, ada: str, fake_engine: FakeEngine, route: str
) -> None:
    response = either(client, route)
    base = who(response)
    assert (base["level"], base["recipe"], base["reason"]) == ("base", None, "the request names no user")
    assert (response.json()["model"], response.headers["X-MTA-Level"]) == ("mta", "base")
    assert "X-MTA-Recipe" not in response.headers
    assert fake_engine.seen[-1].body["model"] == "base"
    response = either(client, route, user=ada, model="base")
    assert (response.json()["model"], who(response)["level"]) == ("base", "base")
    assert "profile" not in who(response)["timings_ms"]
    assert error_of(either(client, route, user=ada, model="base", personalize="merged"))[:2] == (400, "personalize")


def test_the_header_names_the_user_as_well_as_the_field(client: Client, new_user: NewUser) -> None:
    user = f"é-{new_user()}"
    put(client, user, [{"text": "the sea"}])
    header = {"X-User-ID": user.encode()}
    fields: list[dict[str, Any]] = [{}, {"user": user}, {"user": f"e\u0301{user[1:]}"}]
    assert [who(ask(client, headers=header, **more))["level"] for more in fields] == ["merged"] * 3
    empty = {"X-User-ID": ""}
    assert who(ask(client, headers=empty))["reason"] == "the request names no user"
    assert who(ask(client, user, headers=empty))["level"] == "merged"


def test_the_operator_chooses_the_headers_that_name_the_user(
    gateway_settings: Settings, ada: str, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    first, second = "X-OpenWebUI-User-Id", "x-litellm-user_api_key_end_user_id"
    with GatewayThread(gateway_settings, user_headers=f"{first}, {second}") as gateway, gateway.client() as client:
        for known in ({first: ada}, {first.lower(): ada}, {second: ada}, {first: "", second: ada}):
            assert who(ask(client, headers=known))["level"] == "merged"
        assert who(ask(client, headers={first: ada, second: new_user()}))["level"] == "merged"
        assert who(ask(client, headers={first: new_user(), second: ada}))["reason"] == "unknown user"
        assert who(ask(client, headers={"X-User-ID": ada}))["reason"] == "the request names no user"
        answered = len(fake_engine.seen)
        for name in (first, second):
            assert error_of(ask(client, headers={name: "{{USER_ID}}"}))[:2] == (400, name.lower())
            differs = ask(client, ada, headers={name: "bob"})
            assert error_of(differs)[:2] == (400, "user")
            assert f"but {name} is 'bob'" in differs.json()["error"]["message"]
        assert len(fake_engine.seen) == answered


def test_wrong_users_are_refused(client: Client, ada: str, new_user: NewUser, fake_engine: FakeEngine) -> None:
    assert error_of(ask(client, ada, headers={"X-User-ID": "bob"}))[:2] == (400, "user")
    for bad in ("a/b", "..", "x" * 257):
        assert error_of(ask(client, headers={"X-User-ID": bad}))[:2] == (400, "x-user-id")
    for other in ("bob", ada, ""):
        twice = client.post("/v1/chat/completions", json=HELLO, headers=[("X-User-ID", ada), ("x-user-id", other)])
        assert error_of(twice)[:2] == (400, "x-user-id")
    assert error_of(client.post("/v1/completions", json=HELLO, headers={"X-User-ID": b"\xff"}))[0] == 400
    assert error_of(ask(client, "a b"))[:2] == (400, "user")
    assert error_of(ask(client, personalize="merged")) == (400, "user", "missing")
    assert error_of(ask(client, new_user(), personalize="merged"))[:2] == (404, "user")
    assert fake_engine.seen == []


@pytest.mark.parametrize("stream", [False, True])
def test_known_fields_are_passed_on_unchanged(client: Client, ada: str, fake_engine: FakeEngine, stream: bool) -> None:
    sent = {"n": 2, "stop": ["END"], "seed": 7, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1.5}}
    sent |= {"max_completion_tokens": 3, "response_format": {"type": "json_object"}}
    sent |= {"min_tokens": 2, "ignore_eos": True, "skip_special_tokens": False}
    sent |= {"chat_template_kwargs": {"enable_thinking": False}}
    ignored = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    answer = ask(client, ada, stream=stream, **sent, **ignored).raise_for_status()
    assert answer.headers["X-MTA-Ignored"] == "store, metadata, service_tier"
    seen = fake_engine.seen[-1]
    own = {"model": seen.body["model"], "cache_salt": UserKeys(SECRET, "default").cache_salt}
    assert seen.body == HELLO | sent | own | STREAMED  # two sequences are streamed, so that each releases its place
    assert seen.headers["X-Session-ID"] == seen.body["model"]
    assert ada not in json.dumps(seen.body) + json.dumps(seen.headers)


def test_the_operator_chooses_the_template_arguments(gateway_settings: Settings, fake_engine: FakeEngine) -> None:
    with serving(gateway_settings, chat_template_kwargs="effort, thinking") as client:
        given = {"effort": "low", "thinking": True}
        ask(client, chat_template_kwargs=given).raise_for_status()
        assert fake_engine.seen[-1].body["chat_template_kwargs"] == given
        refused = ask(client, chat_template_kwargs={"effort": 1, "enable_thinking": False})
        assert error_of(refused) == (400, "chat_template_kwargs", "refused_field")
        assert "'enable_thinking'; allowed here (MTA_CHAT_TEMPLATE_KWARGS): effort, thinking" in refused.text
    assert len(fake_engine.seen) == 1


@pytest.mark.parametrize(("default", "context", "longest"), [(1024, 512, 512 - 5), (100, 512, 100), (100, 80, 80 - 5)])
def test_without_a_length_the_default_is_asked_for_or_what_fits(
    gateway_settings: Settings, fake_engine: FakeEngine, default: int, context: int, longest: int
) -> None:
    fake_engine.turn(context=context)
    with serving(gateway_settings, default_max_tokens=default) as client:
        for route, tokens in (("/generate", longest), ("/v1/chat/completions", longest), ("/v1/completions", 16)):
            answer = either(client, route, max_tokens=None).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == tokens
            assert "stream" not in fake_engine.seen[-1].body
        assert error_of(ask(client, max_completion_tokens=context))[:2] == (400, "max_completion_tokens")


@ALL
@pytest.mark.parametrize("user", ["ada", "nobody"])
def test_the_engines_own_sampling_is_the_default_of_each_field(
    gateway_settings: Settings, fake_engine: FakeEngine, ada: str, route: str, user: str
) -> None:
    fake_engine.turn(sampling={"temperature": 0.2, "top_p": 0.9})
    with serving(gateway_settings) as client:
        assert client.get("/ready").json()["parts"]["engines"][0]["sampling"] == fake_engine.knobs.sampling
        for sent in ({}, {"temperature": 1.5}, {"temperature": 0, "top_p": 0.5, "top_k": 7}):
            either(client, route, user=ada if user == "ada" else user, **sent).raise_for_status()
            body = fake_engine.seen[-1].body
            found = {name: body[name] for name in Sampling.model_fields if name in body}
            assert found == {"temperature": 0.2, "top_p": 0.9} | sent
            assert (body["model"] == "base") is (user == "nobody")


@ALL
def test_an_engine_that_reports_no_sampling_keeps_its_own(
    gateway_settings: Settings, fake_engine: FakeEngine, route: str
) -> None:
    fake_engine.turn(sampling=None)
    with serving(gateway_settings) as client:
        either(client, route).raise_for_status()
    assert not Sampling.model_fields.keys() & fake_engine.seen[-1].body.keys()


@pytest.mark.parametrize("prompt", ["hello", ["hello", "there"], [7, 8, 9], [[7], [8, 9]]])
def test_a_prompt_is_continued_as_it_is(client: Client, fake_engine: FakeEngine, prompt: Any) -> None:
    answer = either(client, "/v1/completions", prompt=prompt, n=2).raise_for_status().json()
    body = fake_engine.seen[-1].body
    assert (body["prompt"], "messages" in body) == (prompt, False)
    prompts = 2 if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * prompts))


def test_the_engines_own_refusals_are_passed_on(client: Client, fake_engine: FakeEngine) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    refused = ask(client, tools=tools)
    assert error_of(refused) == (400, "tools", "no_tool_parser")
    assert "MTA_TOOL_PARSER" in refused.json()["error"]["message"]
    assert error_of(ask(client, n=2, temperature=0))[:2] == (400, None)
    fake_engine.knobs.strict = True  # only the conversation can be at fault
    assert error_of(ask(client, messages=HELLO["messages"] * 2))[:2] == (400, "messages")


@BOTH
def test_only_the_first_chunk_of_a_stream_has_personalization(client: Client, ada: str, route: str) -> None:
    whole, response = either(client, route, user=ada).json(), either(client, route, user=ada, stream=True)
    *chunks, done = chunks_of(response)
    said = whole["choices"][0]
    assert (done, text_of(chunks)) == ("[DONE]", said["text"] if "text" in said else said["message"]["content"])
    kind = "chat.completion.chunk" if "chat" in route else "text_completion"
    assert {(chunk["object"], chunk["model"], chunk["id"]) for chunk in chunks} == {(kind, "mta", chunks[0]["id"])}
    assert [chunk for chunk in chunks if "personalization" in chunk] == chunks[:1]
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[0]["personalization"]["recipe"] == response.headers["X-MTA-Recipe"]
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]


@BOTH
def test_usage_and_logprobs_are_streamed_on_request(client: Client, route: str) -> None:
    whole, options = either(client, route).json(), {"include_usage": True}
    *chunks, last, done = chunks_of(either(client, route, stream=True, stream_options=options))
    assert (last["choices"], last["usage"], done) == ([], whole["usage"], "[DONE]")
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    options["continuous_usage_stats"] = True
    *chunks, _ = chunks_of(either(client, route, stream=True, stream_options=options))
    assert all(chunk["usage"]["prompt_tokens"] for chunk in chunks)
    *chunks, _ = chunks_of(ask(client, stream=True, n=2, logprobs=True))
    assert text_of(chunks, 0) == text_of(chunks, 1) != ""
    logprobs = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert len(logprobs) == 2 * HELLO["max_tokens"]


def test_everything_in_the_prompt_counts(client: Client, gateway: GatewayThread, fake_engine: FakeEngine) -> None:
    long = "x" * gateway.opened.settings.max_prompt_chars
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": long}}
    for fields in (
        {"messages": [{"role": "user", "content": long + "x"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": long}}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}, *HELLO["messages"]]},
        {"messages": [{"role": "assistant", "content": "a", "reasoning": long}, *HELLO["messages"]]},
        {"messages": [{"role": "tool", "content": "a", "tool_call_id": long}, *HELLO["messages"]]},
        {"messages": [{"role": "user", "content": "a", "name": long}]},
    ):
        assert error_of(ask(client, **fields)) == (400, "messages", "prompt_too_long")
    halves = [long[: len(long) // 2 + 1]] * 2
    assert error_of(either(client, "/v1/completions", prompt=halves)) == (400, "prompt", "prompt_too_long")
    assert fake_engine.seen == []
