"""`POST /generate` over a fake engine: personalization, what the engine is sent, timings, streams and length limits."""

from __future__ import annotations

import json

import pytest
from httpx import Client

from adapters.recipe import parse_recipe
from bench.rig.processes import wait_until
from server.store.tenants.user_key import UserKeys
from tests.support.calls import ALL, NewUser, either, error_of, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, GatewayThread, chunks_of, generate, text_of, wait_until_ready


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


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_is_sent(client: Client, ada: str, fake_engine: FakeEngine, stream: bool) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "stop": "END", "seed": 7}
    answer = generate(client, ada, prompt="Zwölf Boxkämpfer 🥊", stream=stream, **sampling)
    seen, keys = fake_engine.seen[-1], UserKeys(SECRET, "default")
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert seen.body == {
        "model": seen.body["model"],
        "messages": [{"role": "user", "content": "Zwölf Boxkämpfer 🥊"}],
        "max_tokens": 4,
        **sampling,
        "stop": ["END"],
        "cache_salt": keys.cache_salt,
        **(options if stream else {}),
    }
    assert seen.headers["X-Session-ID"] == seen.body["model"]
    assert seen.headers["X-Request-ID"] in answer.text
    sent = json.dumps(seen.body) + json.dumps(seen.headers)
    assert [name for name in (ada, keys.key(ada)) if name in sent] == []


@pytest.mark.parametrize(("chars", "streamed"), [(40, False), (200, True)])
def test_the_engine_streams_a_whole_answer_that_may_not_fit(
    client: Client, ada: str, fake_engine: FakeEngine, chars: int, streamed: bool
) -> None:
    generate(client, ada, prompt="x" * chars, max_tokens=100).raise_for_status()
    assert fake_engine.seen[-1].body.get("stream", False) is streamed


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
    said = {"messages": [{"role": "user", "content": "x" * 500}]} if "chat" in route else {"prompt": "x" * 500}
    assert either(client, route, **said, max_tokens=12, stream=stream).status_code == 200
    fake_engine.knobs.token_delay_s = 0.05
    refused = either(client, route, **said, max_tokens=13, stream=stream)
    assert error_of(refused) == (400, "max_tokens", "context_length_exceeded")
    assert "Ask for at most 12" in refused.json()["error"]["message"]
    seen = fake_engine.seen[-1]  # a whole answer reports the prompt's length at its end
    wait_until(lambda: seen.aborted or (seen.ended and "stream" not in seen.body), "the engine to be told")
