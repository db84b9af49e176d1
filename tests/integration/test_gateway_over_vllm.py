"""The gateway over a real vLLM: more than it can serve, and answers in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from bench.fleet.capacity import Overload
from bench.fleet.streams import Load
from bench.rig.engine import KEY, Engine
from server.engine_protocol import key_header
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


@pytest.mark.parametrize("prompt", ["Tell me", ["Tell me", "Once upon"]], ids=["one prompt", "two"])
def test_a_wide_request_in_parts_is_answered_as_in_one_piece(
    client: httpx.Client, gateway_settings: Settings, tiny_engine: Engine, prompt: str | list[str]
) -> None:
    asked = {"prompt": prompt, "max_tokens": 6, "n": 5, "seed": 11, "temperature": 1.0, "model": "base", "logprobs": 1}
    update = {"engine_url": tiny_engine.url, "engine_places": 8}  # a quarter is two
    with GatewayThread(gateway_settings.model_copy(update=update)) as narrow, narrow.client() as beside:
        wait_until_ready(beside)
        whole, parted = (one.post("/v1/completions", json=asked) for one in (client, beside))
    assert (whole.status_code, parted.status_code) == (200, 200), whole.text + parted.text
    for answer in (whole.json(), parted.json()):
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    texts, again = ([choice["text"] for choice in answer.json()["choices"]] for answer in (whole, parted))
    assert texts == again
    assert len(set(texts[:5])) > 1
    assert whole.json()["usage"] == parted.json()["usage"]
    for choice in parted.json()["choices"]:
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"]) == 6


def test_several_answers_come_back_as_the_engine_would_say_them_in_one_piece(
    client: httpx.Client, tiny_engine: Engine
) -> None:
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "n": 3, "seed": 3, "model": "base"}
    asked |= {"logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=asked).json()
    headers = key_header(KEY)
    straight = httpx.post(f"{tiny_engine.url}/v1/chat/completions", json=asked, headers=headers, timeout=60).json()
    assert answer["usage"]["total_tokens"] == straight["usage"]["total_tokens"]
    for ours, theirs in zip(answer["choices"], straight["choices"], strict=True):
        told = {name: value for name, value in theirs["message"].items() if value is not None or name == "refusal"}
        assert ours["message"] == told
        assert ours["finish_reason"] == theirs["finish_reason"]
        tokens = [[one["token"] for one in choice["logprobs"]["content"]] for choice in (ours, theirs)]
        assert tokens[0] == tokens[1]
