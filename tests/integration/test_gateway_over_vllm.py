"""The gateway over a real vLLM: more than it can serve, and answers in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bench.fleet.capacity import Overload
from bench.fleet.streams import Load
from bench.rig.engine import Engine
from server.settings import Settings
from tests.support.gateway import GatewayThread, wait_until_ready


@pytest.fixture(scope="module")
def client(gateway_over_vllm: GatewayThread) -> Iterator[httpx.Client]:
    with gateway_over_vllm.client() as client:
        yield client


def test_two_gateways_bear_more_than_they_can_serve(gateway_settings: Settings, tiny_engine: Engine) -> None:
    """The short form of `mta bench overload`, whose claims about time it leaves out."""
    update = {"engine_url": tiny_engine.url, "send_timeout_s": 1, "engine_places": 8, "queue_places": 8}
    settings = gateway_settings.model_copy(update=update)
    loads: dict[str, Load] = {}
    with GatewayThread(settings) as one, GatewayThread(settings) as other:
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
def test_a_wide_request_in_parts_or_not_is_answered_as_the_engine_would_in_one_piece(
    client: httpx.Client, gateway_settings: Settings, tiny_engine: Engine, asked: dict[str, Any]
) -> None:
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    asked = asked | {"max_tokens": 6, "n": 5, "seed": 11, "temperature": 1.0, "model": "base"}
    update = {"engine_url": tiny_engine.url, "engine_places": 8}  # a quarter is two
    with GatewayThread(gateway_settings.model_copy(update=update)) as narrow, narrow.client() as beside:
        wait_until_ready(beside)
        clients = (tiny_engine.client, client, beside)
        straight, *answers = (one.post(path, json=asked).raise_for_status().json() for one in clients)
    wanted = [said(choice) for choice in straight["choices"]]
    assert len({tuple(tokens) for *_, tokens in wanted}) > 1
    for answer in answers:
        assert [said(choice) for choice in answer["choices"]] == wanted
        assert answer["usage"]["total_tokens"] == straight["usage"]["total_tokens"]
