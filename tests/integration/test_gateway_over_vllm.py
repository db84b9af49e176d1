"""The gateway over a real vLLM: from items to personal text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from bench.fleet.capacity import Overload
from bench.fleet.streams import Load
from bench.rig.engine import KEY, Engine
from bench.rig.processes import wait_until
from bench.rig.tiny import world
from server.engine_protocol import key_header
from server.settings import Settings
from tests.support.gateway import GatewayThread, wait_until_ready

NewUser = Callable[[], str]


@pytest.fixture(scope="module")
def client(gateway_settings: Settings, tiny_engine: Engine) -> Iterator[httpx.Client]:
    settings = gateway_settings.model_copy(update={"engine_url": tiny_engine.url})
    with GatewayThread(settings) as gateway, gateway.client() as client:
        wait_until_ready(client)
        yield client


@pytest.fixture
def ada(client: httpx.Client, new_user: NewUser) -> str:
    user_id = new_user()
    client.put(f"/users/{user_id}/profile", json={"items": [{"text": world(1)}]}).raise_for_status()
    return user_id


def generate(client: httpx.Client, user_id: str, **fields: Any) -> httpx.Response:
    body = {"user_id": user_id, "prompt": "hello there", "max_tokens": 24, "temperature": 0}
    return client.post("/generate", json=body | fields)


def test_people_get_answers_of_their_own(client: httpx.Client, ada: str, new_user: NewUser) -> None:
    bob = new_user()
    client.put(f"/users/{bob}/profile", json={"items": [{"text": world(4)}]}).raise_for_status()
    answers = {
        "ada": generate(client, ada),
        "bob": generate(client, bob),
        "nobody": generate(client, new_user()),
    }
    texts = {name: response.raise_for_status().json()["text"] for name, response in answers.items()}
    levels = {name: response.json()["personalization"]["level"] for name, response in answers.items()}
    assert levels == {"ada": "merged", "bob": "merged", "nobody": "base"}
    assert len(set(texts.values())) == 3
    assert generate(client, ada).json()["text"] == texts["ada"]
    assert generate(client, ada, personalize="none").json()["text"] == texts["nobody"]


def test_a_stream_says_the_same_as_a_whole_answer(client: httpx.Client, ada: str) -> None:
    events = generate(client, ada, stream=True).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [httpx.Response(200, text=event.removeprefix("data: ")).json() for event in events[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    whole = generate(client, ada).json()
    assert text == whole["text"]
    assert chunks[-1]["usage"] == whole["usage"]


def test_the_context_is_known_before_and_kept_by_the_engine(client: httpx.Client, ada: str) -> None:
    asks_too_much = generate(client, ada, max_tokens=512)
    leaves_too_little = generate(client, ada, prompt="x" * 480, max_tokens=40)
    says_too_much = generate(client, ada, prompt="x" * 600)
    assert (asks_too_much.status_code, asks_too_much.json()["error"]["param"]) == (400, "max_tokens")
    assert (leaves_too_little.status_code, leaves_too_little.json()["error"]["param"]) == (400, "max_tokens")
    assert (says_too_much.status_code, says_too_much.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted_in_the_engine(
    client: httpx.Client, tiny_engine: Engine, ada: str, stream: bool
) -> None:
    before = _metric(tiny_engine, "vllm:generation_tokens_total")
    body = {"user_id": ada, "prompt": "x", "max_tokens": 450, "temperature": 1, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        if stream:
            with client.stream("POST", "/generate", json=body, timeout=httpx.Timeout(30, read=0.2)) as response:
                next(response.iter_lines())
                raise httpx.ReadTimeout("enough heard")
        client.post("/generate", json=body, timeout=httpx.Timeout(30, read=0.2))
    wait_until(lambda: _metric(tiny_engine, "vllm:num_requests_running") == 0, "the engine to stop")
    assert 0 < _metric(tiny_engine, "vllm:generation_tokens_total") - before < 450


def _metric(engine: Engine, name: str) -> float:
    lines = engine.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


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
