"""OpenAI's routes over a fake engine: chunks, errors midway, and clients that leave."""

from __future__ import annotations

import httpx
import pytest

from bench.rig.processes import wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, chunks_of
from tests.support.openai import BOTH, HELLO, ask, either, text_of


@BOTH
def test_the_first_chunk_says_who_speaks_and_none_has_usage_unless_it_is_asked_for(
    client: httpx.Client, ada: str, route: str
) -> None:
    whole = either(client, route, user=ada).json()
    response = either(client, route, user=ada, stream=True)
    *chunks, done = chunks_of(response)
    assert done == "[DONE]"
    said = whole["choices"][0]
    assert text_of(chunks) == (said["text"] if "text" in said else said["message"]["content"])
    kind = "chat.completion.chunk" if "chat" in route else "text_completion"
    assert {(chunk["object"], chunk["model"], chunk["id"]) for chunk in chunks} == {(kind, "mta", chunks[0]["id"])}
    assert [("personalization" in chunk, "usage" in chunk) for chunk in chunks] == [(True, False)] + [
        (False, False)
    ] * (len(chunks) - 1)
    assert chunks[0]["personalization"]["recipe"] == response.headers["X-MTA-Recipe"]
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]


@BOTH
def test_usage_comes_last_and_alone_where_it_is_asked_for(client: httpx.Client, route: str) -> None:
    whole = either(client, route).json()
    options = {"include_usage": True}
    *chunks, last, done = chunks_of(either(client, route, stream=True, stream_options=options))
    assert (last["choices"], last["usage"], done) == ([], whole["usage"], "[DONE]")
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)


def test_usage_so_far_comes_where_it_is_asked_for(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = chunks_of(ask(client, stream=True, stream_options=options))
    assert all(chunk["usage"]["prompt_tokens"] for chunk in chunks)


def test_every_choice_comes_with_its_logprobs(client: httpx.Client) -> None:
    *chunks, _ = chunks_of(ask(client, stream=True, n=2, logprobs=True))
    assert text_of(chunks, 0) == text_of(chunks, 1) != ""
    logprobs = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert len(logprobs) == 2 * HELLO["max_tokens"]


def test_an_error_midway_is_an_event_without_done(client: httpx.Client, ada: str, fake_engine: FakeEngine) -> None:
    fake_engine.knobs.fail_after = 2
    *chunks, last = chunks_of(ask(client, ada, stream=True))
    assert chunks[0]["personalization"]["level"] == "merged"
    assert (last["error"]["type"], "[DONE]" in chunks) == ("engine_error", False)


@BOTH
@pytest.mark.parametrize("garbage", [b"data: {]\n\n", b"data: {}\n\n", b'data: {"choices": [{}]}\n\n'])
def test_what_is_no_completion_is_the_engines_fault(
    client: httpx.Client, fake_engine: FakeEngine, route: str, garbage: bytes
) -> None:
    fake_engine.knobs.garbage = garbage
    response = either(client, route, stream=True)
    error = response.json()["error"] if response.status_code != 200 else chunks_of(response)[-1]["error"]
    assert error["type"] == "engine_error"


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_which_the_engine_aborted_a_choice_is_no_answer(
    client: httpx.Client, fake_engine: FakeEngine, route: str, stream: bool
) -> None:
    fake_engine.knobs.finish_reasons = ("stop", "abort")
    response = either(client, route, stream=stream, n=2, temperature=1)
    *chunks, last = chunks_of(response) if stream else [response.json()]
    assert last["error"]["type"] == "engine_error"
    assert "[DONE]" not in chunks


def test_an_engine_without_the_adapter_answers_as_the_base_model(
    client: httpx.Client, ada: str, fake_engine: FakeEngine
) -> None:
    fake_engine.knobs.lacks = lambda model: model != "base"
    response = ask(client, ada, stream=True)
    assert chunks_of(response)[0]["personalization"]["level"] == response.headers["X-MTA-Level"] == "base"


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_generation_with_it(
    gateway: GatewayThread, fake_engine: FakeEngine, route: str, stream: bool
) -> None:
    fake_engine.knobs.token_delay_s = 30
    with gateway.client(timeout_s=0.5) as hasty, pytest.raises(httpx.ReadTimeout):
        either(hasty, route, stream=stream)
    wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to notice")
