"""`POST /generate` over a fake engine: who speaks, what is said, and what happens when something breaks."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from adapters.recipe import parse_recipe
from bank.manifest import read_manifest
from bench.rig.processes import wait_until
from server.settings import Settings
from server.store.tenants.user_key import UserKeys
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, chunks_of, generate, text_of, wait_until_ready
from tests.support.openai import ALL, either, error_of

NewUser = Callable[[], str]


def test_a_user_with_a_profile_is_answered_by_their_anchors(
    client: httpx.Client, ada: str, fake_engine: FakeEngine, gateway_settings: Settings
) -> None:
    answer = generate(client, ada).raise_for_status().json()
    who = answer["personalization"]
    assert (who["level"], who["source"], who["reason"]) == ("merged", "topic", None)
    recipe = parse_recipe(who["recipe"])
    assert recipe.bank == read_manifest(gateway_settings.bank).short
    assert {anchor["id"]: anchor["weight"] for anchor in who["anchors"]} == {
        f"a{term.anchor:02d}": term.weight / 1000 for term in recipe.terms
    }
    first, second = who["anchors"]
    assert first["id"] == "a00"
    assert first["similarity"] > second["similarity"]
    assert first["weight"] > second["weight"]
    assert fake_engine.seen[-1].body["model"] == who["recipe"]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert answer["finish_reason"] == "length"
    assert len(answer["text"].split()) == 4


def test_an_unknown_user_is_answered_by_the_base_model_and_told_so(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    who = generate(client, new_user()).raise_for_status().json()["personalization"]
    assert (who["level"], who["recipe"], who["anchors"], who["reason"]) == ("base", None, [], "unknown user")
    assert fake_engine.seen[-1].body["model"] == "base"


def test_a_merged_answer_for_an_unknown_user_is_refused(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    assert error_of(generate(client, new_user(), personalize="merged")) == (404, "user_id", "not_found")
    assert fake_engine.seen == []


def test_the_base_model_answers_when_it_is_asked_for(client: httpx.Client, ada: str) -> None:
    who = generate(client, ada, personalize="none").json()["personalization"]
    assert (who["level"], who["recipe"]) == ("base", None)
    assert "profile" not in who["timings_ms"]  # nothing was looked up


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_is_sent(client: httpx.Client, ada: str, fake_engine: FakeEngine, stream: bool) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "stop": "END", "seed": 7}
    answer = generate(client, ada, stream=stream, **sampling)
    seen = fake_engine.seen[-1]
    keys = UserKeys(SECRET, "default")
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert seen.body == {
        "model": seen.body["model"],
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        **sampling,
        "stop": ["END"],
        "cache_salt": keys.cache_salt,
        **(options if stream else {}),
    }
    assert seen.headers["X-Session-ID"] == seen.body["model"]
    assert seen.headers["X-Request-ID"] in answer.text
    assert ada not in json.dumps(seen.body) + json.dumps(seen.headers)
    assert keys.key(ada) not in json.dumps(seen.body) + json.dumps(seen.headers)


def test_a_conversation_is_passed_on_as_it_is(client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "Zwölf Boxkämpfer 🥊"},
    ]
    client.post("/generate", json={"user_id": ada, "messages": messages, "max_tokens": 2}).raise_for_status()
    assert fake_engine.seen[-1].body["messages"] == messages


def test_timings_are_in_the_answer_and_in_the_header(client: httpx.Client, ada: str) -> None:
    response = generate(client, ada)
    timings = response.json()["personalization"]["timings_ms"]
    assert list(timings) == ["profile", "recipe", "engine", "total"]
    assert timings["engine"] <= timings["total"]
    assert response.headers["Server-Timing"] == ", ".join(f"{name};dur={ms}" for name, ms in timings.items())


@pytest.mark.parametrize(("prompt", "streamed"), [("x" * 40, False), ("x" * 200, True)])
def test_the_engine_streams_a_whole_answer_only_where_the_context_may_not_suffice(
    client: httpx.Client, ada: str, fake_engine: FakeEngine, prompt: str, streamed: bool
) -> None:
    client.post("/generate", json={"user_id": ada, "prompt": prompt, "max_tokens": 100}).raise_for_status()
    assert fake_engine.seen[-1].body.get("stream", False) is streamed


def test_a_stream_says_who_speaks_first_and_ends_with_usage_timings_and_done(client: httpx.Client, ada: str) -> None:
    whole = generate(client, ada).json()
    response = generate(client, ada, stream=True)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *chunks, done = chunks_of(response)
    assert done == "[DONE]"
    first, last = chunks[0], chunks[-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        (first["id"], first["created"], whole["personalization"]["recipe"])
    }
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    without_timings = {name: value for name, value in whole["personalization"].items() if name != "timings_ms"}
    assert first["personalization"].items() >= without_timings.items()
    assert list(first["personalization"]["timings_ms"]) == ["profile", "recipe", "engine_ttft"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last["usage"] == whole["usage"]
    assert list(last["timings_ms"]) == ["profile", "recipe", "engine_ttft", "engine", "total"]
    assert text_of(chunks) == whole["text"]
    named = {part.partition(";")[0] for part in response.headers["Server-Timing"].split(", ")}
    assert named == {"profile", "recipe", "engine_ttft"}


def test_tokens_are_passed_on_while_the_engine_still_speaks(
    client: httpx.Client, ada: str, fake_engine: FakeEngine
) -> None:
    fake_engine.knobs.token_delay_s = 0.05
    body = {"user_id": ada, "prompt": "hello", "max_tokens": 40, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        for line in response.iter_lines():
            if "content" in line and '"content":""' not in line:
                break
        assert fake_engine.seen[-1].tokens < 40


@ALL
@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_prompt_leaves_is_refused_and_never_cut_short(
    client: httpx.Client, fake_engine: FakeEngine, route: str, stream: bool
) -> None:
    wait_until_ready(client)  # the engine's context of 512 is known from here on
    said = {"messages": [{"role": "user", "content": "x" * 500}]} if "chat" in route else {"prompt": "x" * 500}
    assert either(client, route, **said, max_tokens=12, stream=stream).status_code == 200
    fake_engine.knobs.token_delay_s = 0.05
    refused = either(client, route, **said, max_tokens=13, stream=stream)
    assert error_of(refused) == (400, "max_tokens", "context_length_exceeded")
    assert "Ask for at most 12" in refused.json()["error"]["message"]
    seen = fake_engine.seen[-1]  # a whole answer tells the prompt's length at its end
    wait_until(lambda: seen.aborted or (seen.ended and "stream" not in seen.body), "the engine to be told")
