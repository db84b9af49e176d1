"""What one key, one user and all together may ask of a gateway: limits, and the line before the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.gateway.users.adapting import Adapting
from server.settings import Settings
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import NO_OVERRIDES, Allowance
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, Keyed, generate, make_keys, metric

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SHOWN = ("limit", "remaining", "reset")
PER_USER = 6
"""Requests a minute."""
PLACES, WAITING = 2, 3
"""In the engine, and before it."""
ALLOWED: Mapping[str, Allowance] = {
    "any": NO_OVERRIDES,
    "requests": Allowance(requests=PER_USER + 3),
    **dict.fromkeys(("tokens", "failures", "leavers"), Allowance(tokens=100)),
    "jobs": Allowance(jobs=3),
    "erasing": Allowance(requests=50),
    "two at once": Allowance(concurrent=2),
}


@dataclass(frozen=True)
class Limited(Keyed):
    """A gateway that limits users, before a small engine; its keys are those of `ALLOWED`, each of its own tenant."""

    engine: FakeEngine
    new_user: Callable[[], str]


@pytest.fixture(scope="module")
def keyed(gateway_settings: Settings, store: ValkeyProcess, fake_engine_server: FakeEngine) -> Iterator[Keyed]:
    keys = make_keys(store.url, {name: (name.replace(" ", "-"), Scope, ALLOWED[name]) for name in ALLOWED})
    limits = {"user_requests": PER_USER, "user_jobs": 2, "engine_places": PLACES, "queue_places": WAITING}
    with GatewayThread(gateway_settings.model_copy(update={"redis_url": store.url, **limits})) as gateway:
        yield Keyed(gateway, keys)


@pytest.fixture
def limited(keyed: Keyed, fake_engine: FakeEngine, new_user: Callable[[], str]) -> Limited:
    return Limited(keyed.gateway, keyed.secrets, fake_engine, new_user)


def shown(response: httpx.Response, what: str) -> tuple[str | None, ...]:
    """What the headers say of a limit."""
    return tuple(response.headers.get(f"x-ratelimit-{name}-{what}") for name in SHOWN)


def left_of(response: httpx.Response) -> int:
    """How many tokens the headers say are left."""
    return int(response.headers["x-ratelimit-remaining-tokens"])


def refused(response: httpx.Response, code: str = "rate_limit_exceeded") -> dict[str, Any]:
    """The error of a 429."""
    assert response.status_code == 429, response.text
    assert 1 <= int(response.headers["Retry-After"]) <= 24 * 3600
    error: dict[str, Any] = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, code)
    return error


def chat(client: httpx.Client, user: str | None = None, **fields: Any) -> httpx.Response:
    named = {"user": user} if user else {}
    return client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4} | named | fields)


class TestLine:
    """More than the engine computes at once. It comes first: a key that was there lately keeps its share of places."""

    def test_some_wait_and_the_rest_is_refused(self, limited: Limited) -> None:
        client, counted = limited.client("any"), ('mta_shed_total{reason="queue_full"}', "mta_queue_seconds_count")
        before = [metric(client, name) for name in counted]
        limited.engine.knobs.token_delay_s = 0.02
        with ThreadPoolExecutor(12) as many:
            answers = list(many.map(lambda n: generate(client, f"u{n}", max_tokens=20, stream=n % 2 == 1), range(12)))
        good = [answer for answer in answers if answer.status_code == 200]
        assert PLACES + WAITING <= len(good) < 12
        waited = [answer for answer in good if "queue;dur=" in answer.headers["Server-Timing"]]
        assert WAITING <= len(waited) <= len(good) - PLACES
        for answer in answers:
            if answer not in good:
                refused(answer, "overloaded")
        after = [metric(client, name) for name in counted]
        assert [now - then for now, then in zip(after, before, strict=True)] == [12 - len(good), len(good)]
        assert metric(client, "mta_queue_running") == metric(client, "mta_queue_waiting") == 0

    def test_a_request_says_how_long_it_waits(self, limited: Limited) -> None:
        client = limited.client("any")
        with taken(client, limited.engine, max_tokens=20):
            for path, body in (
                ("/generate", {"user_id": "kai", "prompt": "hello", "max_tokens": 4}),
                ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 4}),
                ("/v1/completions", {"prompt": "hello", "max_tokens": 4}),
            ):
                refused(client.post(path, json=body, headers={"X-Queue-Timeout": "0.05"}), "overloaded")
                wrong = client.post(path, json=body, headers={"X-Queue-Timeout": "-1"})
                assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "X-Queue-Timeout")

    def test_a_client_that_leaves_while_waiting_frees_its_place(self, limited: Limited) -> None:
        client = limited.client("any")
        with taken(client, limited.engine, max_tokens=40), ThreadPoolExecutor(WAITING) as many:
            waiting = [many.submit(generate, client, limited.new_user()) for _ in range(WAITING - 1)]
            wait_until(lambda: metric(client, "mta_queue_waiting") == WAITING - 1, "all of them to wait")
            with pytest.raises(httpx.ReadTimeout):
                client.post("/generate", json={"user_id": "kai", "prompt": "x"}, timeout=0.3)
            assert generate(client, limited.new_user()).status_code == 200  # it waited where kai had
            assert {answer.result().status_code for answer in waiting} == {200}
        assert len(limited.engine.seen) == PLACES + WAITING


class TestRates:
    """Requests and tokens a minute."""

    def test_requests_of_a_user_on_both_kinds_of_routes(self, limited: Limited) -> None:
        client, ada = limited.client("any"), limited.new_user()
        ask = (lambda: generate(client, ada), lambda: generate(client, ada, stream=True), lambda: chat(client, ada))
        for left in reversed(range(PER_USER)):
            answer = ask[left % 3]()
            assert answer.status_code == 200
            limit, remaining, reset = shown(answer, "requests")
            assert (limit, remaining) == (str(PER_USER), str(left))
            assert reset is not None and 0 < float(reset.removesuffix("s")) <= 120
            assert shown(answer, "tokens") == (None,) * 3
        for again in (*(one() for one in ask), chat(client, ada, stream=True)):
            assert f"{PER_USER} requests a minute" in refused(again)["message"]
            assert shown(again, "requests")[:2] == (str(PER_USER), "0")
        assert generate(client, limited.new_user()).status_code == 200
        assert chat(client).status_code == 200
        assert len(limited.engine.seen) == PER_USER + 2

    def test_a_user_over_their_limit_uses_up_nothing_of_their_app(self, limited: Limited) -> None:
        client, ada = limited.client("requests"), limited.new_user()
        answers = [generate(client, ada) for _ in range(PER_USER + 5)]
        assert [answer.status_code for answer in answers] == [200] * PER_USER + [429] * 5
        assert [generate(client, limited.new_user()).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert shown(generate(client, limited.new_user()), "requests")[:2] == (str(PER_USER + 3), "0")

    def test_tokens_count_as_they_were_used(self, limited: Limited) -> None:
        client = limited.client("tokens")
        answer = generate(client, limited.new_user(), max_tokens=60).raise_for_status()
        used = answer.json()["usage"]["total_tokens"]
        assert used < 70
        assert shown(answer, "tokens")[:2] == ("100", str(100 - 1 - 60))
        wait_until(
            lambda: left_of(generate(client, limited.new_user(), max_tokens=300)) >= 100 - used, "some to be given back"
        )
        answer = generate(client, limited.new_user(), max_tokens=60)
        assert "100 tokens a minute" in refused(answer)["message"]
        assert int(answer.headers["Retry-After"]) >= (60 - left_of(answer)) * 60 / 100
        assert chat(client, max_tokens=1, stream=True).status_code == 200

    def test_what_the_engine_never_saw_costs_no_tokens(self, limited: Limited) -> None:
        client = limited.client("failures")
        limited.engine.knobs.status = 500
        for status in (503, 503, 404, 503):
            wanted = {"personalize": "merged"} if status == 404 else {}
            wait_until(
                lambda status=status, wanted=wanted: (
                    generate(client, limited.new_user(), max_tokens=90, **wanted).status_code == status
                ),
                "all tokens to be left",
            )

    def test_who_leaves_a_whole_answer_midway_is_charged_for_it(self, limited: Limited) -> None:
        client = limited.client("leavers")
        limited.engine.knobs.token_delay_s = 0.05
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json={"user_id": limited.new_user(), "prompt": "x", "max_tokens": 60}, timeout=0.5)
        wait_until(lambda: limited.engine.seen[0].aborted, "the engine to be told")
        limited.engine.knobs.token_delay_s = 0.0
        assert (
            100 - 60 <= left_of(generate(client, limited.new_user(), max_tokens=300)) < 100 - 20
        )  # some leaks meanwhile

    def test_requests_about_users_count_and_erasing_does_not(self, limited: Limited) -> None:
        client, body = limited.client("any"), {"items": [{"text": "the sea"}]}
        url = f"/users/{limited.new_user()}"
        assert client.put(f"{url}/profile", json=body).status_code == 200
        for _ in range(PER_USER - 1):
            assert client.post(f"{url}/profile/items", json=body).status_code == 200
        refused(client.get(url))
        refused(client.put(f"{url}/profile", json=body))
        assert client.delete(url).status_code == 200
        assert client.get("/health").status_code == 200

    def test_jobs_a_day_and_no_repeated_or_refused_request_is_one(self, limited: Limited) -> None:
        def adapt(user: str, text: str, **fields: Any) -> httpx.Response:
            body = {"samples": [{"input": "Any plans?", "output": text}], **fields}
            return client.post(f"/users/{user}/adapt", json=body)

        client, ada, kai = limited.client("jobs"), limited.new_user(), limited.new_user()
        assert adapt(ada, " ").status_code == 400
        first = adapt(ada, "the sea").raise_for_status().json()["id"]
        assert adapt(ada, "the sea").json()["id"] == first
        assert adapt(ada, "the sea again").status_code == 202
        assert "2 adapt jobs a day" in refused(adapt(ada, "and again"))["message"]
        assert adapt(ada, "the sea again").status_code == 202  # its answer may have been lost
        assert adapt(kai, "roses", idempotency_key="k").status_code == 202
        assert adapt(kai, "roses", idempotency_key="k").status_code == 202
        assert "3 adapt jobs a day" in refused(adapt(kai, "more roses"))["message"]

    def test_a_job_that_the_store_did_not_take_is_none(self, limited: Limited, monkeypatch: pytest.MonkeyPatch) -> None:
        async def away(*_: object) -> None:
            raise Unavailable("the store cannot be used now")

        def adapt(text: str) -> int:
            body = {"samples": [{"input": "Any plans?", "output": text}]}
            return client.post(f"/users/{user}/adapt", json=body).status_code

        client, user = limited.client("any"), limited.new_user()
        for step in ("job_ids", "submit"):
            with monkeypatch.context() as patched:
                patched.setattr(Adapting, step, away)
                assert adapt("the sea") == 503
        assert [adapt(text) for text in ("the sea", "roses", "frost")] == [202, 202, 429]

    def test_erasing_counts_only_where_there_was_nobody_and_is_never_refused(self, limited: Limited) -> None:
        client, known = limited.client("erasing"), [limited.new_user() for _ in range(3)]
        for user in known:
            items = {"items": [{"text": "up at five for the waves"}]}
            client.put(f"/users/{user}/profile", json=items).raise_for_status()
        for user in (known[0], known[0], known[1]):
            assert client.delete(f"/users/{user}").status_code == 200
        assert {client.delete(f"/users/{limited.new_user()}").status_code for _ in range(50)} == {404}
        tries = itertools.count()  # fewer than the limit has room for without what was erased
        wait_until(lambda: client.get("/v1/models").status_code == 429 or next(tries) > 30, "the limit")
        assert next(tries) < 30
        assert "50 requests a minute" in refused(client.get("/v1/models"))["message"]
        assert client.delete(f"/users/{limited.new_user()}").status_code == 404
        assert client.delete(f"/users/{known[2]}").status_code == 200


class TestAtOnce:
    """Requests in progress."""

    def test_of_one_key_only_so_many_over_all_gateways(self, limited: Limited) -> None:
        limited.engine.knobs.token_delay_s = 0.05
        client, settings = limited.client("two at once"), limited.gateway.parts.settings
        with GatewayThread(settings) as another, ThreadPoolExecutor(2) as many:
            other = Keyed(another, limited.secrets).client("two at once")
            asked = [many.submit(generate, one, "ada", max_tokens=20) for one in (client, other)]
            wait_until(lambda: len(limited.engine.seen) == 2, "both to be in progress")
            for one in (client, other):
                assert "limit of concurrent requests, 2:" in refused(generate(one, "kai"))["message"]
            assert {answer.result().status_code for answer in asked} == {200}
            wait_until(lambda: generate(other, limited.new_user()).status_code == 200, "a place to be free")


class TestWithoutTheStore:
    """While nothing can be counted."""

    def test_what_needs_no_profile_is_served_uncounted(
        self, gateway_settings: Settings, fake_engine: FakeEngine, tmp_path: Path
    ) -> None:
        store = ValkeyProcess(tmp_path).start()
        limits = {"key_requests": 1, "key_tokens": 10, "key_concurrent": 1, "key_jobs": 2}
        limits |= {"user_requests": 3, "user_tokens": 4, "user_jobs": 5}
        settings = gateway_settings.model_copy(update={"redis_url": store.url, **limits})
        with GatewayThread(settings) as gateway, gateway.client() as client:
            limiter = gateway.parts.limiter
            assert (limiter._per_key, limiter._per_user) == (Allowance(1, 10, 2, 1), Allowance(3, 4, 5))
            assert chat(client, model="base").status_code == 200
            refused(chat(client, model="base"))
            store.kill()
            answers = [chat(client, model="base") for _ in range(2)]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert shown(answers[0], "requests") == (None,) * 3
            assert generate(client, "ada").status_code == 503

    def test_without_a_limit_nothing_is_asked(
        self, gateway: GatewayThread, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gateway.parts.limiter, "_store", None)
        monkeypatch.setattr(gateway.parts.limiter.in_progress, "_store", None)
        assert chat(client, model="base").status_code == 200


@contextmanager
def taken(client: httpx.Client, engine: FakeEngine, max_tokens: int) -> Iterator[None]:
    """While all places in the engine are."""
    engine.knobs.token_delay_s = 0.05
    with ThreadPoolExecutor(PLACES) as beside:
        slow = [beside.submit(chat, client, max_tokens=max_tokens) for _ in range(PLACES)]
        wait_until(lambda: len(engine.seen) == PLACES, "the places to be taken")
        yield
        assert {answer.result().status_code for answer in slow} == {200}
