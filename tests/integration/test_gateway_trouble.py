"""Generations when the engine lacks an adapter, breaks or goes away, and when the client does."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from bench.rig.processes import wait_until
from server.gateway import opening
from server.gateway.http.streaming import event
from server.gateway.routes import users
from server.gateway.users.adapting import MAX_CONCURRENT
from server.settings import Settings
from tests.support.calls import ALL, BOTH, NewUser, body_of, either, put, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, chunks_of, generate, give_adapter, metric, wait_until_ready


class TestWithoutTheAdapter:
    def test_the_base_model_answers_and_says_why(self, client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
        before = metric(client, "mta_fallbacks_total")
        fake_engine.knobs.lacks = lambda model: model != "base"
        found = who(generate(client, ada))
        assert (found["level"], found["recipe"], found["anchors"]) == ("base", None, [])
        assert "cannot serve" in found["reason"]
        assert [seen.body["model"] == "base" for seen in fake_engine.seen] == [False, True]
        assert metric(client, "mta_fallbacks_total") == before + 1

    @ALL
    def test_a_stream_falls_back_too(self, client: httpx.Client, ada: str, fake_engine: FakeEngine, route: str) -> None:
        fake_engine.knobs.lacks = lambda model: model != "base"
        response = either(client, route, user=ada, stream=True)
        first, *_, done = chunks_of(response)
        assert (first["personalization"]["level"], done) == ("base", "[DONE]")
        assert response.headers.get("X-MTA-Level", "base") == "base"

    def test_without_the_users_adapter_todays_own_recipe_is_served(
        self, client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine, gateway: GatewayThread
    ) -> None:
        user_id = new_user()
        put(client, user_id)
        asyncio.run(give_adapter(gateway, user_id))
        merged = who(generate(client, user_id, personalize="merged"))
        fake_engine.knobs.user_adapters, fake_engine.knobs.lacks = True, lambda model: ":u-" in model
        found = who(generate(client, user_id))
        beneath, spoke = (seen.body["model"] for seen in fake_engine.seen[-2:])
        assert not beneath.startswith(f"{merged['recipe']}:u-")
        assert spoke == merged["recipe"]
        same = {"level", "recipe", "source", "anchors"}
        assert {name: found[name] for name in same} == {name: merged[name] for name in same}
        assert found["reason"] == "the engine cannot serve this user's adapter"

    def test_without_what_was_asked_for(self, client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.lacks = lambda model: model != "base"
        response = generate(client, ada, personalize="merged")
        assert (response.status_code, "Retry-After" in response.headers) == (503, True)
        fake_engine.seen.clear()
        fake_engine.knobs.lacks = lambda model: True  # not even the base model
        assert (generate(client, ada).status_code, len(fake_engine.seen)) == (502, 2)


class TestBrokenEngine:
    @ALL
    @pytest.mark.parametrize(
        "knobs",
        [
            {"die_after": 2},
            {"fail_after": 2},
            {"garbage": b"data: {]\n\n"},
            {"garbage": b"data: {}\n\n"},
            {"garbage": b'data: {"choices": [{}]}\n\n'},
            {"finish_reasons": ("abort",)},
        ],
    )
    def test_a_stream_ends_in_an_error_event_without_done(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, *, route: str, knobs: dict[str, Any]
    ) -> None:
        fake_engine.turn(**knobs)
        response = either(client, route, user=ada, stream=True)
        *chunks, last = chunks_of(response) if response.status_code == 200 else [response.json()]
        assert last["error"]["type"] == "engine_error"
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert "[DONE]" not in chunks
        assert route != "/generate" or chunks[0]["personalization"]["level"] == "merged"

    @BOTH
    @pytest.mark.parametrize("stream", [False, True])
    def test_an_aborted_choice(self, client: httpx.Client, fake_engine: FakeEngine, route: str, stream: bool) -> None:
        fake_engine.knobs.finish_reasons = ("stop", "abort")
        response = either(client, route, stream=stream, n=2, temperature=1)
        *chunks, last = chunks_of(response) if stream else [response.json()]
        assert last["error"]["type"] == "engine_error"
        assert "[DONE]" not in chunks

    @pytest.mark.parametrize(
        ("stream", "knobs", "status"),
        [
            (True, {"die_after": 0}, 502),
            (True, {"fail_after": 0}, 503),
            (False, {"die_after": 2}, 503),
            (False, {"fail_after": 0}, 503),
            (False, {"garbage": b"7"}, 502),
            (False, {"garbage": b"{"}, 502),
            (False, {"finish_reasons": ("abort",)}, 502),
            *((False, {"status": status}, 503) for status in (500, 503, 429)),
            *((False, {"status": status}, 502) for status in (401, 418)),
        ],
    )
    def test_an_answer_that_never_began(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, *, stream: bool, knobs: Any, status: int
    ) -> None:
        fake_engine.turn(**knobs)
        response = generate(client, ada, stream=stream)
        assert response.status_code == status
        assert response.json()["error"]["type"] == ("engine_error" if status == 502 else "service_unavailable")
        assert ("Retry-After" in response.headers) == (status == 503)

    @pytest.mark.parametrize("fields", [{"stream": True}, {"n": 2}])  # vLLM answers 200 before it looks at these
    def test_what_it_refuses_in_a_stream(self, client: httpx.Client, fake_engine: FakeEngine, fields: Any) -> None:
        refusal = {"message": "out-of-vocab", "type": "BadRequestError", "param": "logit_bias", "code": 400}
        fake_engine.turn(garbage=event({"error": refusal}))
        asked = {"model": "base", "prompt": "hi", "max_tokens": 4, "logit_bias": {"999999": 1}}
        refused = client.post("/v1/completions", json=asked | fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")
        assert len(fake_engine.seen) == 1

    def test_while_it_is_down(self, client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
        fake_engine.stop()
        try:
            for stream in (False, True):
                response = generate(client, ada, stream=stream)
                assert (response.status_code, response.json()["error"]["type"]) == (503, "service_unavailable")
                assert int(response.headers["Retry-After"]) > 0
        finally:
            fake_engine.start()
        assert generate(client, ada).status_code == 200

    def test_its_silence_ends(self, gateway_settings: Settings, fake_engine: FakeEngine, new_user: NewUser) -> None:
        fake_engine.knobs.token_delay_s = 30
        with GatewayThread(gateway_settings, engine_timeout_s=0.3) as gateway, gateway.client() as client:
            for stream in (False, True):
                response = generate(client, new_user(), stream=stream)
                assert (response.status_code, response.json()["error"]["code"]) == (502, "engine_timeout")


@pytest.mark.parametrize(
    "case", [("engines.admin.TOKENIZE_TIMEOUT_S", 600, 1), ("users.adapting.MAX_CHECK_S", 0.3, 20)]
)
def test_samples_are_accepted_uncounted_if_engine_is_slow(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    limit, fake_engine.knobs.admit_s, samples = case
    monkeypatch.setattr(f"server.gateway.{limit}", 0.2)
    wait_until_ready(client)  # it knows the context, so that it asks how long a long sample is
    long = [{"input": f"{n} " + "x" * 470, "output": "y"} for n in range(samples)]  # its bytes exceed the context
    job = client.post(f"/users/{new_user()}/adapt", json={"samples": long}).raise_for_status().json()
    client.delete(f"/jobs/{job['id']}").raise_for_status()
    assert len(fake_engine.tokenized) < samples


def test_sample_requests_of_a_tenant_are_checked_one_by_one(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    fake_engine.knobs.admit_s = 0.05
    wait_until_ready(client)
    long = [{"input": f"{n} " + "x" * 470, "output": "y"} for n in range(12)]  # its bytes exceed the context
    with ThreadPoolExecutor(6) as pool:
        for answer in pool.map(lambda user: client.post(f"/users/{user}/adapt", json={"samples": long}),
                               [new_user() for _ in range(6)]):  # fmt: skip
            client.delete(f"/jobs/{answer.raise_for_status().json()['id']}").raise_for_status()
    assert len(fake_engine.tokenized) >= 6 * len(long)
    assert max(fake_engine.tokenizing) <= MAX_CONCURRENT


class TestSilence:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.gateway.http.streaming.KEEP_ALIVE_S", 0.05)

    def test_a_stream_sends_comments(self, client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.admit_s = fake_engine.knobs.token_delay_s = 0.3
        response = generate(client, ada, stream=True, max_tokens=2)
        comment, *rest = response.text.split("\n\n")
        assert comment == ": keep-alive"
        assert response.headers["X-Accel-Buffering"] == "no"
        events = [json.loads(line.removeprefix("data: ")) for line in rest if "{" in line]
        assert events[0]["personalization"]["level"] == "merged"
        words = [place for place, line in enumerate(rest) if "content" in line]
        assert comment in rest[words[0] : words[-1]]
        assert rest[-2:] == ["data: [DONE]", ""]

    def test_a_later_error_is_an_event(self, client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
        before = metric(client, "mta_broken_streams_total")
        fake_engine.knobs.admit_s, fake_engine.knobs.status = 0.3, 500
        response = generate(client, ada, stream=True)
        assert response.status_code == 200
        *comments, error, end = response.text.split("\n\n")
        assert set(comments) == {": keep-alive"}
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "service_unavailable"
        assert end == ""
        assert metric(client, "mta_broken_streams_total") == before + 1


class TestClientsThatLeave:
    @pytest.mark.parametrize("stream", [False, True])
    def test_midway(self, gateway: GatewayThread, client: httpx.Client, fake_engine: FakeEngine, stream: bool) -> None:
        before = metric(client, "mta_disconnects_total")
        fake_engine.knobs.token_delay_s = 0.02
        body = json.dumps({"user_id": "nobody", "prompt": "hello", "max_tokens": 400, "stream": stream}).encode()
        with gateway.send("POST /generate", body):
            wait_until(lambda: bool(fake_engine.seen) and fake_engine.seen[-1].tokens > 2, "the first tokens")
        wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to notice")
        assert fake_engine.seen[-1].tokens < 400
        wait_until(lambda: metric(client, "mta_disconnects_total") == before + 1, "the gateway to count it")

    @ALL
    @pytest.mark.parametrize("stream", [False, True])
    def test_before_admission(self, gateway: GatewayThread, fake_engine: FakeEngine, route: str, stream: bool) -> None:
        fake_engine.knobs.token_delay_s = 30  # nothing is ever sent
        with gateway.send(f"POST {route}", json.dumps(body_of(route, stream=stream)).encode()):
            wait_until(lambda: bool(fake_engine.seen), "the engine to be asked")
        wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to notice")


def test_a_bug_of_the_gateway_is_answered_with_the_requests_id(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users, "call_of", Mock(side_effect=RuntimeError("no idea what to do")))
    answers = [httpx.get(client.base_url.join("/users/ada")) for _ in range(2)]  # such a connection may end
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {(500, "internal_error")}
    first, second = (answer.headers["X-Request-Id"] for answer in answers)
    assert len(first) == len(second) == 24
    assert first != second


def test_broken_search_library_is_logged_and_gateway_serves(
    gateway_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "ItemIndex", Mock(side_effect=ImportError("a broken library")))
    with GatewayThread(gateway_settings) as own, own.client() as client:
        wait_until(lambda: "a broken library" in caplog.text, "the failure to be logged")
        generate(client, "ada").raise_for_status()
    assert own._failure is None
