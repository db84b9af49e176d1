"""`POST /generate` over a fake engine: who speaks, what is said, and what happens when something breaks."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapters.recipe import parse_recipe
from bank.manifest import read_manifest
from server.settings import Settings
from server.user_key import UserKeys
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, GatewayThread
from tests.support.processes import wait_until
from tests.support.tiny import world

NewUser = Callable[[], str]


@pytest.fixture
def ada(client: httpx.Client, new_user: NewUser) -> str:
    """A user who writes about the first anchor's world, and a little about the third's."""
    user_id = new_user()
    items = [{"text": world(0)}, {"text": f"{world(0)} again"}, {"text": world(2)}]
    client.put(f"/users/{user_id}/profile", json={"items": items}).raise_for_status()
    return user_id


def generate(client: httpx.Client, user_id: str, **fields: Any) -> httpx.Response:
    return client.post("/generate", json={"user_id": user_id, "prompt": "hello", "max_tokens": 4} | fields)


def chunks_of(response: httpx.Response) -> list[Any]:
    """The values of a stream's events, `[DONE]` as a string."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if isinstance(chunk, dict))


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
    assert fake_engine.seen[-1].body["model"] == who["recipe"]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert answer["finish_reason"] == "length"
    assert len(answer["text"].split()) == 4


def test_the_nearer_anchor_speaks_louder(client: httpx.Client, ada: str) -> None:
    first, second = generate(client, ada).json()["personalization"]["anchors"]
    assert first["id"] == "a00"
    assert first["similarity"] > second["similarity"]
    assert first["weight"] > second["weight"]


def test_an_unknown_user_is_answered_by_the_base_model_and_told_so(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    who = generate(client, new_user()).raise_for_status().json()["personalization"]
    assert (who["level"], who["recipe"], who["anchors"], who["reason"]) == ("base", None, [], "unknown user")
    assert fake_engine.seen[-1].body["model"] == "base"


def test_a_merged_answer_for_an_unknown_user_is_refused(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    response = generate(client, new_user(), personalize="merged")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "user_id"
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
    assert seen.body == {
        "model": seen.body["model"],
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        **sampling,
        "stop": ["END"],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "cache_salt": keys.cache_salt,
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
    assert list(timings) == ["profile", "recipe", "engine_ttft", "engine", "total"]
    assert timings["engine_ttft"] <= timings["engine"] <= timings["total"]
    assert response.headers["Server-Timing"] == ", ".join(f"{name};dur={ms}" for name, ms in timings.items())


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


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_prompt_leaves_is_refused_and_never_cut_short(
    client: httpx.Client, ada: str, fake_engine: FakeEngine, stream: bool
) -> None:
    client.get("/ready").raise_for_status()  # the engine's context of 512 is known from here on
    prompt = "x" * 500
    assert generate(client, ada, prompt=prompt, max_tokens=12, stream=stream).status_code == 200
    fake_engine.knobs.token_delay_s = 0.05
    refused = generate(client, ada, prompt=prompt, max_tokens=13, stream=stream)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "max_tokens", "context_length_exceeded")
    assert "12 at most" in error["message"]
    wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to be told")


class TestFallback:
    """The engine lacks the adapter."""

    def test_the_base_model_answers_and_says_why(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, gateway: GatewayThread
    ) -> None:
        before = _metric(client, "mta_fallbacks_total")
        fake_engine.knobs.lacks = lambda model: model != "base"
        who = generate(client, ada).raise_for_status().json()["personalization"]
        assert (who["level"], who["recipe"], who["anchors"]) == ("base", None, [])
        assert "cannot serve" in who["reason"]
        assert [seen.body["model"] == "base" for seen in fake_engine.seen] == [False, True]
        assert _metric(client, "mta_fallbacks_total") == before + 1

    def test_a_stream_falls_back_too(self, client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.lacks = lambda model: model != "base"
        chunks = chunks_of(generate(client, ada, stream=True))
        assert chunks[0]["personalization"]["level"] == "base"
        assert chunks[0]["model"] == "base"
        assert chunks[-1] == "[DONE]"

    def test_who_insists_on_merged_is_refused(self, client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.lacks = lambda model: model != "base"
        response = generate(client, ada, personalize="merged")
        assert response.status_code == 503
        assert response.headers["Retry-After"]

    def test_an_engine_without_a_base_model_is_at_fault(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine
    ) -> None:
        fake_engine.knobs.lacks = lambda model: True
        response = generate(client, ada)
        assert response.status_code == 502
        assert len(fake_engine.seen) == 2


class TestBrokenEngine:
    """The engine fails before or in the middle of an answer."""

    @pytest.mark.parametrize(
        "knobs", [{"die_after": 2}, {"fail_after": 2}, {"garbage": b"data: {]\n\n"}, {"garbage": b"data: {}\n\n"}]
    )
    def test_a_stream_ends_in_an_error_event_without_done(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, knobs: dict[str, Any]
    ) -> None:
        for name, value in knobs.items():
            setattr(fake_engine.knobs, name, value)
        *chunks, last = chunks_of(generate(client, ada, stream=True))
        assert chunks[0]["personalization"]["level"] == "merged"
        assert last["error"]["type"] == "engine_error"
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert "[DONE]" not in chunks

    @pytest.mark.parametrize("knobs", [{"die_after": 0}, {"fail_after": 0}])
    def test_a_stream_that_never_began_is_an_error_like_any_other(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, knobs: dict[str, Any]
    ) -> None:
        for name, value in knobs.items():
            setattr(fake_engine.knobs, name, value)
        response = generate(client, ada, stream=True)
        assert response.status_code == 502
        assert response.json()["error"]["type"] == "engine_error"

    @pytest.mark.parametrize("knobs", [{"die_after": 2}, {"fail_after": 0}, {"garbage": b"data: 7\n\n"}])
    def test_a_whole_answer_becomes_an_error(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, knobs: dict[str, Any]
    ) -> None:
        for name, value in knobs.items():
            setattr(fake_engine.knobs, name, value)
        response = generate(client, ada)
        assert response.status_code == 502
        assert response.json()["error"]["type"] == "engine_error"

    @pytest.mark.parametrize(("status", "expected"), [(500, 503), (503, 503), (429, 503), (401, 502), (418, 502)])
    def test_its_refusals_are_translated(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, status: int, expected: int
    ) -> None:
        fake_engine.knobs.status = status
        response = generate(client, ada)
        assert response.status_code == expected
        assert ("Retry-After" in response.headers) == (expected == 503)

    @pytest.mark.parametrize("stream", [False, True])
    def test_while_it_is_down_requests_are_told_to_come_back(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, stream: bool
    ) -> None:
        fake_engine.stop()
        try:
            response = generate(client, ada, stream=stream)
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) > 0
            assert response.json()["error"]["type"] == "service_unavailable"
        finally:
            fake_engine.start()
        assert generate(client, ada, stream=stream).status_code == 200

    def test_its_silence_ends(self, gateway_settings: Settings, fake_engine: FakeEngine, new_user: NewUser) -> None:
        fake_engine.knobs.token_delay_s = 30
        with (
            GatewayThread(gateway_settings.model_copy(update={"engine_timeout_s": 0.3})) as impatient,
            impatient.client() as client,
        ):
            for stream in (False, True):
                response = generate(client, new_user(), stream=stream)
                assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_timeout")


class TestDisconnect:
    """A client that leaves takes its generation with it."""

    @pytest.mark.parametrize("stream", [False, True])
    def test_the_engine_is_told_to_stop(
        self, gateway: GatewayThread, client: httpx.Client, ada: str, fake_engine: FakeEngine, stream: bool
    ) -> None:
        before = _metric(client, "mta_disconnects_total")
        fake_engine.knobs.token_delay_s = 0.02
        body = json.dumps({"user_id": ada, "prompt": "hello", "max_tokens": 400, "stream": stream}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: bool(fake_engine.seen) and fake_engine.seen[-1].tokens > 2, "the first tokens")
        wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to notice")
        assert fake_engine.seen[-1].tokens < 400
        wait_until(lambda: _metric(client, "mta_disconnects_total") == before + 1, "the gateway to count it")

    def test_a_client_that_leaves_before_the_engine_admits_is_noticed(
        self, gateway: GatewayThread, ada: str, fake_engine: FakeEngine
    ) -> None:
        fake_engine.knobs.token_delay_s = 30  # nothing is ever sent
        with gateway.client(timeout_s=0.5) as hasty, pytest.raises(httpx.ReadTimeout):
            generate(hasty, ada)
        wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to notice")


def test_connections_to_the_engine_are_used_again(client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
    ports = []
    for _ in range(10):
        generate(client, ada).raise_for_status()
        generate(client, ada, stream=True).raise_for_status()
        ports.append(fake_engine.seen[-1].peer_port)
    assert len(set(ports)) <= 2  # the next request can come while the last few bytes of this one are still read


def _metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))
