"""What one key, one user and all together may ask of a gateway: limits, the queue before the engine, fair shares."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.gateway.http import bodies, serving
from server.gateway.http.bodies import LARGE_AT_ONCE, SMALL_BYTES
from server.gateway.users.adapting import Adapting
from server.gateway.users.histories import HistoryLimit
from server.settings import Settings
from server.store.jobs import Job, JobStore
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import NO_OVERRIDES, Allowance
from tests.support.calls import NewUser, either, error_of, put
from tests.support.calls import ask as chat
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, Keyed, generate, make_keys, metric

PER_USER = 6  # requests a minute
PLACES, WAITING = 2, 3  # in the engine and before it, of the small gateway
MOST = 16  # requests in progress in the wide gateway, which has half as many places
ALLOWED: Mapping[str, Allowance] = {
    **dict.fromkeys(("any", "greedy", "modest"), NO_OVERRIDES),
    "requests": Allowance(requests=PER_USER + 3),
    **dict.fromkeys(("tokens", "leavers"), Allowance(tokens=100)),
    "failures": Allowance(tokens=100, concurrent=9),  # so that each request waits until the last one is settled
    "jobs": Allowance(jobs=3),
    "erasing": Allowance(requests=50),
    "one at once": Allowance(concurrent=1),
    "two at once": Allowance(concurrent=2),
    "two a minute": Allowance(requests=2),
    "few tokens": Allowance(tokens=10),
}


@pytest.fixture(scope="module")
def keys(store: ValkeyProcess) -> Mapping[str, str]:
    """Keys of `ALLOWED`, each of a tenant of its own."""
    return make_keys(store.url, {name: (name.replace(" ", "-"), Scope, ALLOWED[name]) for name in ALLOWED})


@pytest.fixture(scope="module")
def small(gateway_settings: Settings, store: ValkeyProcess, keys: Mapping[str, str]) -> Iterator[Keyed]:
    """A gateway that limits users, before a small engine."""
    limits = {"user_requests": PER_USER, "user_jobs": 2, "engine_places": PLACES, "queue_places": WAITING}
    with GatewayThread(gateway_settings, redis_url=store.url, **limits) as gateway:
        yield Keyed(gateway, keys)


@pytest.fixture(scope="module")
def wide(gateway_settings: Settings, store: ValkeyProcess, keys: Mapping[str, str]) -> Iterator[Keyed]:
    changes = {"redis_url": store.url, "max_requests": MOST, "engine_places": MOST // 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bodies, "BODY_TIMEOUT_S", 5.0)
        with GatewayThread(gateway_settings, **changes) as gateway:
            yield Keyed(gateway, keys)


def shown(response: httpx.Response, what: str) -> tuple[str | None, ...]:
    """What the headers say of a limit."""
    return tuple(response.headers.get(f"x-ratelimit-{name}-{what}") for name in ("limit", "remaining", "reset"))


def left_of(response: httpx.Response) -> int:
    return int(response.headers["x-ratelimit-remaining-tokens"])


def refused(response: httpx.Response, code: str = "rate_limit_exceeded") -> str:
    """The message of a 429."""
    assert response.status_code == 429, response.text
    assert 1 <= int(response.headers["Retry-After"]) <= 24 * 3600
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, code)
    return str(error["message"])


def adapt(client: httpx.Client, user: str, text: str, **fields: Any) -> httpx.Response:
    return client.post(f"/users/{user}/adapt", json={"samples": [{"input": "Any plans?", "output": text}], **fields})


class TestQueue:
    """It comes first: a key that was there lately keeps its share of places."""

    def test_some_wait_and_the_rest_is_refused(self, small: Keyed, fake_engine: FakeEngine) -> None:
        client, counted = small.client("any"), ('mta_shed_total{reason="queue_full"}', "mta_queue_seconds_count")
        before = [metric(client, name) for name in counted]
        fake_engine.turn(hold_after=1)
        with ThreadPoolExecutor(12) as many:
            asked = [many.submit(generate, client, f"u{n}", max_tokens=20, stream=n % 2 == 1) for n in range(12)]
            wait_until(lambda: sum(each.done() for each in asked) == 12 - PLACES - WAITING, "the rest to be refused")
            assert metric(client, "mta_queue_waiting") == WAITING
            fake_engine.turn(hold_after=None)
        answers = [each.result() for each in asked]
        good = [answer for answer in answers if answer.status_code == 200]
        assert len(good) == PLACES + WAITING
        assert sum("queue;dur=" in answer.headers["Server-Timing"] for answer in good) == WAITING
        for answer in answers:
            if answer not in good:
                refused(answer, "overloaded")
        after = [metric(client, name) for name in counted]
        assert [now - then for now, then in zip(after, before, strict=True)] == [12 - len(good), len(good)]
        assert metric(client, "mta_queue_running") == metric(client, "mta_queue_waiting") == 0

    def test_a_request_says_how_long_it_waits(self, small: Keyed, fake_engine: FakeEngine) -> None:
        client = small.client("any")
        fake_engine.turn(hold_after=1)
        with ThreadPoolExecutor(PLACES) as beside:
            slow = [beside.submit(chat, client, max_tokens=20) for _ in range(PLACES)]
            wait_until(lambda: len(fake_engine.seen) == PLACES, "the places to be taken")
            for route in ("/generate", "/v1/chat/completions", "/v1/completions"):
                client.headers["X-Queue-Timeout"] = "0.05"
                refused(either(client, route), "overloaded")
                client.headers["X-Queue-Timeout"] = "-1"
                assert error_of(either(client, route))[:2] == (400, "X-Queue-Timeout")
            fake_engine.turn(hold_after=None)
            assert {answer.result().status_code for answer in slow} == {200}


class TestRates:
    def test_requests_of_a_user(self, small: Keyed, fake_engine: FakeEngine, new_user: NewUser) -> None:
        client, ada = small.client("any"), new_user()
        ask = (lambda: generate(client, ada), lambda: generate(client, ada, stream=True), lambda: chat(client, ada))
        for left in reversed(range(PER_USER)):
            answer = ask[left % 3]()
            assert answer.status_code == 200
            limit, remaining, reset = shown(answer, "requests")
            assert (limit, remaining) == (str(PER_USER), str(left))
            assert reset is not None and 0 < float(reset.removesuffix("s")) <= 120
            assert shown(answer, "tokens") == (None,) * 3
        for again in (*(one() for one in ask), chat(client, ada, stream=True)):
            assert f"{PER_USER} requests a minute" in refused(again)
            assert shown(again, "requests")[:2] == (str(PER_USER), "0")
        assert generate(client, new_user()).status_code == chat(client).status_code == 200
        assert len(fake_engine.seen) == PER_USER + 2

    def test_a_user_over_their_limit_uses_up_nothing_of_their_app(self, small: Keyed, new_user: NewUser) -> None:
        client, ada = small.client("requests"), new_user()
        answers = [generate(client, ada) for _ in range(PER_USER + 5)]
        assert [answer.status_code for answer in answers] == [200] * PER_USER + [429] * 5
        assert [generate(client, new_user()).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert shown(generate(client, new_user()), "requests")[:2] == (str(PER_USER + 3), "0")

    def test_tokens_count_as_they_were_used(self, small: Keyed, fake_engine: FakeEngine, new_user: NewUser) -> None:
        client = small.client("tokens")
        answer = generate(client, new_user(), max_tokens=60).raise_for_status()
        used = answer.json()["usage"]["total_tokens"]
        assert used < 70
        assert shown(answer, "tokens")[:2] == ("100", str(100 - 1 - 60))
        wait_until(lambda: left_of(generate(client, new_user(), max_tokens=300)) >= 100 - used, "some to be given back")
        answer = generate(client, new_user(), max_tokens=60)
        assert "100 tokens a minute" in refused(answer)
        assert int(answer.headers["Retry-After"]) >= (60 - left_of(answer)) * 60 / 100
        assert chat(client, max_tokens=1, stream=True).status_code == 200

    def test_failures_cost_no_tokens(self, small: Keyed, fake_engine: FakeEngine, new_user: NewUser) -> None:
        client, asked = small.client("failures"), ({}, {}, {"personalize": "merged"}, {})
        fake_engine.knobs.status = 500
        statuses = [generate(client, new_user(), max_tokens=90, **fields).status_code for fields in asked]
        assert statuses == [503, 503, 404, 503]

    def test_who_leaves_midway_is_charged(self, small: Keyed, fake_engine: FakeEngine, new_user: NewUser) -> None:
        client = small.client("leavers")
        fake_engine.turn(hold_after=1)
        body = json.dumps({"user_id": new_user(), "prompt": "x", "max_tokens": 60}).encode()
        with small.send("leavers", "POST /generate", body):
            wait_until(lambda: bool(fake_engine.seen) and fake_engine.seen[0].tokens == 1, "the first token")
        wait_until(lambda: fake_engine.seen[0].aborted, "the engine to be told")
        fake_engine.turn(hold_after=None)
        left = left_of(generate(client, new_user(), max_tokens=300))
        assert 100 - 60 <= left < 100 - 20  # some leaks meanwhile

    def test_requests_about_users_count_and_erasing_does_not(self, small: Keyed, new_user: NewUser) -> None:
        client, body, url = small.client("any"), {"items": [{"text": "the sea"}]}, f"/users/{new_user()}"
        for method, path, times in (("PUT", "profile", 1), ("POST", "profile/items", PER_USER - 1)):
            for _ in range(times):
                assert client.request(method, f"{url}/{path}", json=body).status_code == 200
        refused(client.get(url))
        refused(client.put(f"{url}/profile", json=body))
        assert client.delete(url).status_code == client.get("/health").status_code == 200

    def test_jobs_a_day_and_no_repeated_or_refused_request_is_one(self, small: Keyed, new_user: NewUser) -> None:
        client, ada, kai = small.client("jobs"), new_user(), new_user()
        assert adapt(client, ada, " ").status_code == 400
        first = adapt(client, ada, "the sea").raise_for_status().json()["id"]
        assert adapt(client, ada, "the sea").json()["id"] == first
        assert adapt(client, ada, "the sea again").status_code == 202
        assert "2 adapt jobs a day" in refused(adapt(client, ada, "and again"))
        assert adapt(client, ada, "the sea again").status_code == 202  # its answer may have been lost
        for _ in range(2):
            assert adapt(client, kai, "roses", idempotency_key="k").status_code == 202
        assert "3 adapt jobs a day" in refused(adapt(client, kai, "more roses"))

    def test_equal_requests_at_once_are_one_job(
        self, small: Keyed, new_user: NewUser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def together(*asked: Any) -> Job:
            begun.append(asked)
            while len(begun) < 2:
                await asyncio.sleep(0.01)
            return await submit(*asked)

        client, user, submit, begun = small.client("any"), new_user(), Adapting.submit, list[object]()
        monkeypatch.setattr(Adapting, "submit", together)
        with ThreadPoolExecutor(2) as pool:
            equal = list(pool.map(lambda _: adapt(client, user, "the sea"), range(2)))
        assert len({answer.raise_for_status().json()["id"] for answer in equal}) == 1
        assert [adapt(client, user, text).status_code for text in ("roses", "frost")] == [202, 429]

    def test_a_job_not_stored_is_none(self, small: Keyed, new_user: NewUser, monkeypatch: pytest.MonkeyPatch) -> None:
        async def away(*_: object) -> None:
            raise Unavailable("the store cannot be used now")

        client, user = small.client("any"), new_user()
        for owner in (JobStore, Adapting):
            with monkeypatch.context() as patched:
                patched.setattr(owner, "submit", away)
                assert adapt(client, user, "the sea").status_code == 503
        assert [adapt(client, user, text).status_code for text in ("the sea", "roses", "frost")] == [202, 202, 429]

    def test_erasing_nobody_is_limited_and_erasing_somebody_is_not(self, small: Keyed, new_user: NewUser) -> None:
        client, known = small.client("erasing"), [new_user() for _ in range(3)]
        for user in known:
            put(client, user)
        answers = [client.delete(f"/users/{new_user()}") for _ in range(70)]
        refusals = [answer for answer in answers if answer.status_code != httpx.codes.NOT_FOUND]
        assert len(refusals) > 10
        assert all("50 requests a minute" in refused(answer) for answer in refusals)
        assert [client.delete(f"/users/{user}").status_code for user in known] == [200, 200, 200]
        again = [client.delete(f"/users/{user}").status_code for user in known]  # nothing is stored any more
        assert 429 in again


class TestWithoutTheStore:
    def test_nothing_is_counted(self, gateway_settings: Settings, fake_engine: FakeEngine, tmp_path: Path) -> None:
        limits = {"key_requests": 1, "key_tokens": 10, "key_concurrent": 1, "key_jobs": 2}
        limits |= {"user_requests": 3, "user_tokens": 4, "user_jobs": 5, "profile_items": 6, "profile_bytes": 700}
        with ExitStack() as stack:
            store = stack.enter_context(ValkeyProcess(tmp_path))
            gateway = stack.enter_context(GatewayThread(gateway_settings, redis_url=store.url, **limits))
            client = stack.enter_context(gateway.client())
            limiter = gateway.opened.limiter
            assert (limiter._per_key, limiter._per_user) == (Allowance(1, 10, 2, 1), Allowance(3, 4, 5))
            assert gateway.parts.profiles.limit == HistoryLimit(6, 700)
            assert chat(client, model="base").status_code == 200
            refused(chat(client, model="base"))
            store.kill()
            answers = [chat(client, model="base") for _ in range(2)]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert shown(answers[0], "requests") == (None,) * 3
            assert generate(client, "ada").status_code == 503

    def test_no_limits(self, gateway: GatewayThread, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gateway.opened.limiter, "_store", None)
        assert chat(client, model="base").status_code == 200


class TestRequestsInProgress:
    def test_event_streams_of_one_key_keep_nobody_else_out(self, wide: Keyed, fake_engine: FakeEngine) -> None:
        with wide.client("greedy") as greedy, wide.client("modest") as modest, ExitStack() as held:

            def follow(key: str, client: httpx.Client, times: int) -> list[bytes]:
                job = adapt(client, "ada", "the sea").raise_for_status().json()["id"]
                line = f"GET /jobs/{job}/events"
                return [held.enter_context(wide.send(key, line, b"")).recv(1 << 16) for _ in range(times)]

            begun = follow("greedy", greedy, MOST)
            assert modest.get("/v1/models").status_code == 200
            assert follow("modest", modest, 1)[0].startswith(b"HTTP/1.1 200")
            streams = [head for head in begun if head.startswith(b"HTTP/1.1 200")]
            assert len(streams) == MOST // 8
            assert all(head.startswith(b"HTTP/1.1 429") for head in begun if head not in streams)
            assert greedy.get("/v1/models").status_code == 200

    def test_a_key_has_at_most_half_of_them(self, wide: Keyed, fake_engine: FakeEngine) -> None:
        fake_engine.turn(hold_after=1)
        with wide.client("greedy") as greedy, wide.client("modest") as modest, ThreadPoolExecutor(MOST) as many:
            asked = [many.submit(generate, greedy, "ada", max_tokens=20) for _ in range(MOST)]
            wait_until(lambda: sum(answer.done() for answer in asked) >= MOST // 2, "the others to be refused")
            assert modest.get("/users/kai").status_code == 404
            for path in ("/health", "/ready", "/metrics"):
                assert greedy.get(path).status_code == 200
            fake_engine.turn(hold_after=None)
            answers = [answer.result() for answer in asked]
        assert [answer.status_code for answer in answers].count(200) == MOST // 2
        refused(next(answer for answer in answers if answer.status_code != 200), "overloaded")

    def test_over_all_gateways(self, small: Keyed, wide: Keyed, fake_engine: FakeEngine, new_user: NewUser) -> None:
        fake_engine.turn(hold_after=1)
        clients = [keyed.client("two at once") for keyed in (small, wide)]
        with ThreadPoolExecutor(2) as many:
            asked = [many.submit(generate, client, "ada", max_tokens=20) for client in clients]
            wait_until(lambda: len(fake_engine.seen) == 2, "both to be in progress")
            for client in clients:
                assert "limit of concurrent requests, 2:" in refused(generate(client, "kai"))
            fake_engine.turn(hold_after=None)
            assert {answer.result().status_code for answer in asked} == {200}
            wait_until(lambda: generate(clients[1], new_user()).status_code == 200, "a place to be free")

    def test_an_event_stream_counts_until_it_ends(self, wide: Keyed) -> None:
        with wide.client("one at once") as client:
            job = adapt(client, "ada", "the sea").raise_for_status().json()["id"]
            with wide.send("one at once", f"GET /jobs/{job}/events", b"") as stream:
                assert stream.recv(1 << 16).startswith(b"HTTP/1.1 200")
                assert "limit of concurrent requests, 1:" in refused(client.get("/v1/models"))
            wait_until(lambda: client.get("/v1/models").status_code == 200, "the stream to be over")

    def test_after_an_answer_one_may_ask_at_once(self, wide: Keyed, fake_engine: FakeEngine, monkeypatch: Any) -> None:
        limiter = wide.gateway.opened.limiter
        leave = limiter._leave

        async def leave_late(*request: str) -> None:
            await asyncio.sleep(0.02)
            await leave(*request)

        monkeypatch.setattr(limiter, "_leave", leave_late)
        with wide.client("one at once") as client:
            assert {client.get("/v1/models").status_code for _ in range(20)} == {200}
            assert {generate(client, "ada").status_code for _ in range(5)} == {200}

    def test_slow_large_bodies_of_one_key_do_not_block_another(self, wide: Keyed) -> None:
        with ExitStack() as held, wide.client("modest") as modest:
            for _ in range(LARGE_AT_ONCE):
                body = b" " * (SMALL_BYTES + 1)
                held.enter_context(wide.send("greedy", "PUT /users/ada/profile", body, length=200_000))
            body = {"items": [{"text": "the sea " * 5000, "id": str(number)} for number in range(2)]}
            answer = modest.put("/users/kai/profile", json=body)
            assert int(answer.request.headers["Content-Length"]) > SMALL_BYTES
            assert answer.status_code == 200


def test_clients_that_do_not_read(wide: Keyed, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STALLED_S", 0.5)
    fake_engine.knobs.context = 200_000
    body = json.dumps({"user_id": "ada", "prompt": "x", "max_tokens": 100_000, "stream": True}).encode()
    few = GatewayThread(wide.gateway.opened.settings, engine_places=2, queue_places=20)
    with few as gateway, ExitStack() as held:
        keyed = Keyed(gateway, wide.secrets)
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
