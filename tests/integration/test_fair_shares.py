"""What one key may take while others ask too: requests in progress, event streams, large bodies, and the engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.gateway.http import bodies, serving
from server.gateway.http.bodies import LARGE_AT_ONCE, SMALL_BYTES
from server.settings import Settings
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import NO_OVERRIDES, Allowance
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, Keyed, chunks_of, generate, make_keys

MOST, PLACES = 16, 8
"""Requests in progress, and of them in the engine."""
ALLOWED: Mapping[str, Allowance] = {
    "greedy": NO_OVERRIDES,
    "modest": NO_OVERRIDES,
    "one at once": Allowance(concurrent=1),
    "two a minute": Allowance(requests=2),
    "few tokens": Allowance(tokens=10),
}


@pytest.fixture(scope="module")
def keys(store: ValkeyProcess) -> Mapping[str, str]:
    """Keys of `ALLOWED`, each of a tenant of its own."""
    return make_keys(store.url, {name: (name.replace(" ", "-"), Scope, ALLOWED[name]) for name in ALLOWED})


@pytest.fixture(scope="module")
def keyed(gateway_settings: Settings, store: ValkeyProcess, keys: Mapping[str, str]) -> Iterator[Keyed]:
    update = {"redis_url": store.url, "max_requests": MOST, "engine_places": PLACES}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bodies, "BODY_TIMEOUT_S", 5.0)
        with GatewayThread(gateway_settings.model_copy(update=update)) as gateway:
            yield Keyed(gateway, keys)


def job_of(client: httpx.Client) -> str:
    """A job that no worker ever takes."""
    body = {"samples": [{"input": "Any plans?", "output": f"the sea {time.time()}"}]}
    answer = client.post("/users/ada/adapt", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def begins(connection: socket.socket) -> bytes:
    """The status line and what comes with it."""
    return connection.recv(1 << 16)


class TestRequests:
    """Requests in progress."""

    def test_event_streams_of_one_key_keep_nobody_else_out(self, keyed: Keyed) -> None:
        with keyed.client("greedy") as greedy, keyed.client("modest") as modest, ExitStack() as held:
            line = f"GET /jobs/{job_of(greedy)}/events"
            begun = [begins(held.enter_context(keyed.send("greedy", line, b""))) for _ in range(MOST)]
            assert modest.get("/v1/models").status_code == 200
            line = f"GET /jobs/{job_of(modest)}/events"
            assert begins(held.enter_context(keyed.send("modest", line, b""))).startswith(b"HTTP/1.1 200")
            streams = [head for head in begun if head.startswith(b"HTTP/1.1 200")]
            assert len(streams) == MOST // 8
            assert all(head.startswith(b"HTTP/1.1 429") for head in begun if head not in streams)
            assert greedy.get("/v1/models").status_code == 200

    def test_a_key_has_at_most_half_of_them(self, keyed: Keyed, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.token_delay_s = 0.1
        with keyed.client("greedy") as greedy, keyed.client("modest") as modest, ThreadPoolExecutor(MOST) as many:
            asked = [many.submit(generate, greedy, "ada", max_tokens=20) for _ in range(MOST)]
            wait_until(lambda: sum(answer.done() for answer in asked) >= MOST // 2, "the others to be refused")
            assert modest.get("/users/kai").status_code == 404
            for path in ("/health", "/ready", "/metrics"):
                assert greedy.get(path).status_code == 200
            answers = [answer.result() for answer in asked]
        assert [answer.status_code for answer in answers].count(200) == MOST // 2
        refused = next(answer for answer in answers if answer.status_code != 200)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["Retry-After"]) > 0

    def test_an_event_stream_is_one_of_a_key_s_requests_at_once(self, keyed: Keyed) -> None:
        with keyed.client("one at once") as client:
            with keyed.send("one at once", f"GET /jobs/{job_of(client)}/events", b"") as stream:
                assert begins(stream).startswith(b"HTTP/1.1 200")
                refused = client.get("/v1/models")
                assert refused.status_code == 429
                assert "limit of concurrent requests, 1:" in refused.json()["error"]["message"]
            wait_until(lambda: client.get("/v1/models").status_code == 200, "the stream to be over")

    def test_whoever_has_an_answer_may_ask_again_at_once(self, keyed: Keyed) -> None:
        with keyed.client("one at once") as client:
            assert {client.get("/v1/models").status_code for _ in range(20)} == {200}
            assert {generate(client, "ada").status_code for _ in range(5)} == {200}

    def test_reading_jobs_counts_and_erasing_does_not(self, keyed: Keyed) -> None:
        with keyed.client("two a minute") as client:
            statuses = [client.get(f"/jobs/{'a' * 26}.1").status_code for _ in range(3)]
            assert statuses == [404, 404, 429]
            assert client.delete("/users/nobody").status_code == 404


class TestBodies:
    """Before a body is read, and while it comes."""

    @pytest.mark.parametrize("key", ["two a minute", "few tokens"])
    def test_a_key_s_own_limits_are_looked_at_first(self, keyed: Keyed, key: str) -> None:
        with keyed.client(key) as client:
            wait_until(lambda: generate(client, "ada", max_tokens=9).status_code == 429, "all of it to be used")
        with keyed.send(key, "POST /generate", b"{", length=7_800_000) as sending:
            assert begins(sending).startswith(b"HTTP/1.1 429")

    def test_large_ones_of_one_key_that_trickle_hold_nobody_else_up(self, keyed: Keyed) -> None:
        with ExitStack() as held, keyed.client("modest") as modest:
            for _ in range(LARGE_AT_ONCE):
                body = b" " * (SMALL_BYTES + 1)
                held.enter_context(keyed.send("greedy", "PUT /users/ada/profile", body, length=200_000))
            body = {"items": [{"text": "the sea " * 5000, "id": str(number)} for number in range(2)]}
            answer = modest.put("/users/kai/profile", json=body)
            assert int(answer.request.headers["Content-Length"]) > SMALL_BYTES
            assert answer.status_code == 200


class TestEngine:
    """Places in the engine."""

    def test_of_clients_that_do_not_read_it_never_has_more_than_there_are_places(
        self, keyed: Keyed, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        few = keyed.gateway.parts.settings.model_copy(update={"engine_places": 2, "queue_places": 20})
        monkeypatch.setattr(serving, "STALLED_S", 0.5)
        fake_engine.knobs.context = 200_000
        body = json.dumps({"user_id": "ada", "prompt": "x", "max_tokens": 100_000, "stream": True}).encode()
        with GatewayThread(few) as gateway, ExitStack() as held:
            keyed = Keyed(gateway, keyed.secrets)
            for _ in range(MOST // 2):
                held.enter_context(keyed.send("greedy", "POST /generate", body, buffer=4096))
            over = 0

            def all_were_hung_up_on() -> bool:
                nonlocal over
                running = sum(not (seen.ended or seen.aborted) for seen in list(fake_engine.seen))
                over = over + 1 if running > 2 else 0  # one that was told to stop takes a moment
                assert over < 10, f"{running} sequences in the engine"
                return sum(seen.aborted for seen in list(fake_engine.seen)) == MOST // 2

            wait_until(all_were_hung_up_on, "everyone's turn")
            with keyed.client("modest") as modest:
                assert generate(modest, "kai").status_code == 200
                wait_until(lambda: 'status="499"' in modest.get("/metrics").text, "the requests to be counted")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_wide_request_goes_in_parts_and_comes_back_as_one_answer(
        self, keyed: Keyed, fake_engine: FakeEngine, stream: bool
    ) -> None:
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "n": 5, "seed": 7}
        options = {"stream_options": {"include_usage": True}} if stream else {}
        with keyed.client("modest") as client:
            answer = client.post("/v1/chat/completions", json=asked | {"stream": stream} | options)
            assert answer.status_code == 200, answer.text
            parts = [(seen.body["n"], seen.body["seed"], seen.body["stream"]) for seen in fake_engine.seen]
            assert parts == [(2, 7, True), (2, 9, True), (1, 11, True)]
            assert len({seen.headers["X-Request-ID"] for seen in fake_engine.seen}) == 3
            texts, usage = told(answer, stream)
            assert sorted(texts) == [0, 1, 2, 3, 4]
            assert len(set(texts.values())) == 1 and len(texts[0].split()) == 3
            assert usage == {"prompt_tokens": 5, "completion_tokens": 15, "total_tokens": 20}
            assert "mta_queue_running 0.0" in client.get("/metrics").text.splitlines()

    @pytest.mark.parametrize("stream", [False, True])
    def test_if_one_part_fails_the_others_are_aborted_and_there_is_one_error(
        self, keyed: Keyed, fake_engine: FakeEngine, stream: bool
    ) -> None:
        fake_engine.knobs.token_delay_s = 0.02
        fake_engine.knobs.fail_after = 10
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "n": 6, "stream": stream}
        with keyed.client("modest") as client:
            answer = client.post("/v1/chat/completions", json=asked)
            if stream:
                assert [chunk["error"]["code"] for chunk in chunks_of(answer) if "error" in chunk] == ["engine_failed"]
                assert "[DONE]" not in chunks_of(answer)
            else:
                assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
            wait_until(lambda: all(seen.ended or seen.aborted for seen in fake_engine.seen), "the others to be aborted")
            wait_until(lambda: "mta_queue_running 0.0" in client.get("/metrics").text.splitlines(), "all places back")


def told(answer: httpx.Response, stream: bool) -> tuple[dict[int, str], dict[str, int]]:
    """The texts of an answer's choices, and its usage."""
    if not stream:
        value = answer.json()
        return {one["index"]: one["message"]["content"] for one in value["choices"]}, value["usage"]
    texts: dict[int, str] = {}
    *chunks, end, done = chunks_of(answer)
    assert (end["choices"], done) == ([], "[DONE]")
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return texts, end["usage"]
