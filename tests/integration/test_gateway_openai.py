"""OpenAI's routes over a fake engine: who speaks, under which names, what is passed on and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.store.tenants.user_key import UserKeys
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, GatewayThread, chunks_of, generate, give_adapter, wait_until_ready
from tests.support.openai import BOTH, HELLO, ask, either, error_of, text_of

NewUser = Callable[[], str]


class TestNames:
    """Public names stand where the engine's stood."""

    def test_a_chat_completion_is_openais_with_who_spoke_beside_it(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine
    ) -> None:
        response = ask(client, ada).raise_for_status()
        answer, mine = response.json(), generate(client, ada).json()
        who = answer.pop("personalization")
        assert who | {"timings_ms": 0} == mine["personalization"] | {"timings_ms": 0}
        assert answer.pop("id") == fake_engine.seen[0].headers["X-Request-ID"]
        message = {"role": "assistant", "content": mine["text"]}
        assert answer == {
            "object": "chat.completion",
            "created": 1790000000,
            "model": "mta",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9},
        }
        assert (response.headers["X-MTA-Level"], response.headers["X-MTA-Recipe"]) == ("merged", who["recipe"])
        assert response.headers["Server-Timing"].startswith("profile;dur=")

    @BOTH
    @pytest.mark.parametrize("stream", [False, True])
    def test_nothing_names_the_engines_model_or_the_users_key(
        self,
        client: httpx.Client,
        ada: str,
        fake_engine: FakeEngine,
        gateway: GatewayThread,
        *,
        route: str,
        stream: bool,
    ) -> None:
        fake_engine.knobs.user_adapters = True
        asyncio.run(give_adapter(gateway, ada))
        response = either(client, route, user=ada, stream=stream).raise_for_status()
        assert ":u-" in fake_engine.seen[-1].body["model"]
        told = response.text + json.dumps(dict(response.headers))
        assert UserKeys(SECRET, "default").key(ada) not in told
        assert "kv_transfer_params" not in told
        assert response.headers["X-MTA-Level"] == "stacked"
        assert ":u-" not in told

    def test_there_are_two_models_and_recipes_are_none(self, client: httpx.Client, ada: str) -> None:
        models = client.get("/v1/models").raise_for_status().json()
        assert (models["object"], [model["id"] for model in models["data"]]) == ("list", ["mta", "base"])
        assert all(model.keys() == {"id", "object", "created", "owned_by"} for model in models["data"])
        assert [client.get(f"/v1/models/{name}").json() for name in ("mta", "base")] == models["data"]
        recipe = generate(client, ada).json()["personalization"]["recipe"]
        for name in (recipe, "gpt-4", "meta-llama%2FLlama"):
            assert error_of(client.get(f"/v1/models/{name}")) == (404, "model", "model_not_found")
        for name in (recipe, "gpt-4", ""):
            assert error_of(ask(client, ada, model=name)) == (404, "model", "model_not_found")


class TestWho:
    """Who speaks."""

    @BOTH
    def test_without_a_user_the_base_model_does(
        self, client: httpx.Client, fake_engine: FakeEngine, route: str
    ) -> None:
        response = either(client, route).raise_for_status()
        who = response.json()["personalization"]
        assert (who["level"], who["recipe"], who["reason"]) == ("base", None, "the request names no user")
        assert (response.json()["model"], response.headers["X-MTA-Level"]) == ("mta", "base")
        assert "X-MTA-Recipe" not in response.headers
        assert fake_engine.seen[-1].body["model"] == "base"

    def test_the_model_base_is_the_base_model_whoever_asks(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine
    ) -> None:
        answer = ask(client, ada, model="base").raise_for_status().json()
        assert (answer["model"], answer["personalization"]["level"]) == ("base", "base")
        assert "profile" not in answer["personalization"]["timings_ms"]
        assert error_of(ask(client, ada, model="base", personalize="merged"))[:2] == (400, "personalize")

    def test_the_header_names_the_user_as_well_as_the_field(self, client: httpx.Client, new_user: NewUser) -> None:
        user = f"é-{new_user()}"
        client.put(f"/users/{user}/profile", json={"items": [{"text": "the sea"}]}).raise_for_status()
        header = {"X-User-ID": user.encode()}
        levels = [
            client.post("/v1/chat/completions", json=HELLO | more, headers=header).json()["personalization"]["level"]
            for more in ({}, {"user": user}, {"user": f"e\u0301{user[1:]}"})
        ]
        assert levels == ["merged"] * 3

    def test_two_users_in_one_request_and_ids_that_our_rules_refuse_are_400(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine
    ) -> None:
        assert error_of(ask(client, ada, headers={"X-User-ID": "bob"}))[:2] == (400, "user")
        for bad in ("a/b", "..", "", "x" * 257):
            assert error_of(ask(client, headers={"X-User-ID": bad}))[:2] == (400, "x-user-id")
        assert error_of(client.post("/v1/completions", json=HELLO, headers={"X-User-ID": b"\xff"}))[0] == 400
        assert error_of(ask(client, "a b"))[:2] == (400, "user")
        assert fake_engine.seen == []

    def test_who_insists_on_a_recipe_must_be_somebody_with_a_profile(
        self, client: httpx.Client, new_user: NewUser
    ) -> None:
        assert error_of(ask(client, personalize="merged")) == (400, "user", "missing")
        assert error_of(ask(client, new_user(), personalize="merged"))[:2] == (404, "user")


class TestPassing:
    """What the engine gets."""

    @pytest.mark.parametrize("stream", [False, True])
    def test_it_gets_the_listed_fields_as_they_came_and_our_own(
        self, client: httpx.Client, ada: str, fake_engine: FakeEngine, stream: bool
    ) -> None:
        sent = {"n": 2, "stop": ["END"], "seed": 7, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1.5}}
        sent |= {"max_completion_tokens": 3, "response_format": {"type": "json_object"}}
        ignored = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
        ask(client, ada, stream=stream, **sent, **ignored).raise_for_status()
        seen, keys = fake_engine.seen[-1], UserKeys(SECRET, "default")
        options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        own = {"model": seen.body["model"], "cache_salt": keys.cache_salt}
        assert seen.body == HELLO | sent | own | options  # several come in pieces: their places come back
        assert seen.headers["X-Session-ID"] == seen.body["model"]
        assert ada not in json.dumps(seen.body) + json.dumps(seen.headers)

    def test_without_a_limit_it_is_asked_for_all_that_the_context_leaves(
        self, client: httpx.Client, fake_engine: FakeEngine
    ) -> None:
        wait_until_ready(client)
        answer = ask(client, max_tokens=None).raise_for_status().json()
        assert "max_tokens" not in fake_engine.seen[-1].body
        assert answer["usage"]["total_tokens"] == fake_engine.knobs.context

    @pytest.mark.parametrize("prompt", ["hello", ["hello", "there"], [7, 8, 9], [[7], [8, 9]]])
    def test_a_prompt_is_continued_as_it_is(self, client: httpx.Client, fake_engine: FakeEngine, prompt: Any) -> None:
        answer = either(client, "/v1/completions", prompt=prompt, n=2).raise_for_status().json()
        body = fake_engine.seen[-1].body
        assert (body["prompt"], "messages" in body) == (prompt, False)
        prompts = 2 if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * prompts))

    @BOTH
    @pytest.mark.parametrize("name", ["cache_salt", "top_k"])
    def test_what_steers_it_and_what_is_unknown_is_400(
        self, client: httpx.Client, fake_engine: FakeEngine, route: str, name: str
    ) -> None:
        assert error_of(either(client, route, **{name: "x"}))[:2] == (400, name)
        assert fake_engine.seen == []

    def test_tools_are_its_own_matter(self, client: httpx.Client) -> None:
        tools = [{"type": "function", "function": {"name": "look"}}]
        refused = ask(client, tools=tools)
        assert error_of(refused) == (400, None, "invalid_value")
        assert "--enable-auto-tool-choice" in refused.json()["error"]["message"]
        assert ask(client, tools=tools, tool_choice="required").status_code == 200

    def test_a_refusal_of_its_own_names_the_conversation_only_where_nothing_else_can_be_at_fault(
        self, client: httpx.Client, fake_engine: FakeEngine
    ) -> None:
        assert error_of(ask(client, n=2, temperature=0))[:2] == (400, None)
        fake_engine.knobs.strict = True
        assert error_of(ask(client, messages=HELLO["messages"] * 2))[:2] == (400, "messages")


class TestStreams:
    """Answers in chunks."""

    @BOTH
    def test_the_first_chunk_says_who_speaks_and_none_has_usage_unless_it_is_asked_for(
        self, client: httpx.Client, ada: str, route: str
    ) -> None:
        whole = either(client, route, user=ada).json()
        response = either(client, route, user=ada, stream=True)
        *chunks, done = chunks_of(response)
        assert done == "[DONE]"
        said = whole["choices"][0]
        assert text_of(chunks) == (said["text"] if "text" in said else said["message"]["content"])
        kind = "chat.completion.chunk" if "chat" in route else "text_completion"
        assert {(chunk["object"], chunk["model"], chunk["id"]) for chunk in chunks} == {(kind, "mta", chunks[0]["id"])}
        assert [chunk for chunk in chunks if "personalization" in chunk] == chunks[:1]
        assert not any("usage" in chunk for chunk in chunks)
        assert chunks[0]["personalization"]["recipe"] == response.headers["X-MTA-Recipe"]
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]

    @BOTH
    def test_usage_comes_last_and_alone_where_it_is_asked_for(self, client: httpx.Client, route: str) -> None:
        whole = either(client, route).json()
        options = {"include_usage": True}
        *chunks, last, done = chunks_of(either(client, route, stream=True, stream_options=options))
        assert (last["choices"], last["usage"], done) == ([], whole["usage"], "[DONE]")
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)

    def test_usage_so_far_comes_where_it_is_asked_for(self, client: httpx.Client) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, _ = chunks_of(ask(client, stream=True, stream_options=options))
        assert all(chunk["usage"]["prompt_tokens"] for chunk in chunks)

    def test_every_choice_comes_with_its_logprobs(self, client: httpx.Client) -> None:
        *chunks, _ = chunks_of(ask(client, stream=True, n=2, logprobs=True))
        assert text_of(chunks, 0) == text_of(chunks, 1) != ""
        logprobs = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
        assert len(logprobs) == 2 * HELLO["max_tokens"]


class TestLimits:
    """How long prompt and answer may be."""

    def test_the_limit_is_named_as_the_client_named_it(self, client: httpx.Client) -> None:
        wait_until_ready(client)
        assert error_of(ask(client, max_completion_tokens=512))[:2] == (400, "max_completion_tokens")

    @pytest.mark.parametrize("field", ["content", "tools", "tool_calls"])
    def test_all_that_goes_into_the_prompt_counts(
        self, client: httpx.Client, gateway: GatewayThread, fake_engine: FakeEngine, field: str
    ) -> None:
        long = "x" * gateway.parts.settings.max_prompt_chars
        call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": long}}
        refused = {
            "content": ask(client, messages=[{"role": "user", "content": long + "x"}]),
            "tools": ask(client, tools=[{"type": "function", "function": {"name": "f", "description": long}}]),
            "tool_calls": ask(client, messages=[{"role": "assistant", "tool_calls": [call]}, *HELLO["messages"]]),
        }[field]
        assert error_of(refused) == (400, "messages", "prompt_too_long")
        assert fake_engine.seen == []

    def test_prompts_count_together(self, client: httpx.Client, gateway: GatewayThread) -> None:
        half = "x" * (gateway.parts.settings.max_prompt_chars // 2 + 1)
        assert error_of(either(client, "/v1/completions", prompt=[half, half])) == (400, "prompt", "prompt_too_long")
