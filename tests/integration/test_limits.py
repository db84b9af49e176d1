"""What one key, one user and all together may ask of a gateway: limits, and the line before the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from bench.rig.processes import wait_until
from server.errors import Unavailable
from server.gateway.users.adapting import Adapting
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SHOWN = ("limit", "remaining", "reset")
NewUser = Callable[[], str]
Limited = Callable[..., Any]


@pytest.fixture(scope="module")
def limited(gateway_settings: Settings) -> Limited:
    """Starts a gateway with limits; the tenant is the test's own, so that nobody else uses them up."""

    @contextmanager
    def started(tenant: str, **settings: object) -> Iterator[httpx.Client]:
        update = {"tenant": tenant, **settings}
        with GatewayThread(gateway_settings.model_copy(update=update)) as gateway, gateway.client() as client:
            yield client

    return started


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


class TestRates:
    """Requests and tokens a minute."""

    def test_requests_of_a_user_on_both_kinds_of_routes(self, limited: Limited, fake_engine: FakeEngine) -> None:
        with limited("requests-of-users", user_requests=3) as client:
            for left, answer in enumerate(
                (generate(client, "ada"), generate(client, "ada", stream=True), chat(client, "ada"))
            ):
                assert answer.status_code == 200
                limit, remaining, reset = shown(answer, "requests")
                assert (limit, remaining) == ("3", str(2 - left))
                assert reset is not None and 0 < float(reset.removesuffix("s")) <= 120
                assert shown(answer, "tokens") == (None,) * 3
            for again in (generate(client, "ada"), chat(client, "ada"), chat(client, "ada", stream=True)):
                assert "3 requests a minute" in refused(again)["message"]
                assert shown(again, "requests")[:2] == ("3", "0")
            assert generate(client, "kai").status_code == 200
            assert chat(client).status_code == 200
            assert len(fake_engine.seen) == 5

    def test_a_user_over_their_limit_uses_up_nothing_of_their_app(self, limited: Limited) -> None:
        with limited("apps", user_requests=1, key_requests=4) as client:
            answers = [generate(client, "ada") for _ in range(6)]
            assert [answer.status_code for answer in answers] == [200] + [429] * 5
            assert [generate(client, f"u{n}").status_code for n in range(4)] == [200, 200, 200, 429]
            assert shown(generate(client, "u9"), "requests")[:2] == ("4", "0")

    def test_tokens_count_as_they_were_used(self, limited: Limited) -> None:
        with limited("tokens", key_tokens=100) as client:
            answer = generate(client, "ada", max_tokens=60).raise_for_status()
            used = answer.json()["usage"]["total_tokens"]
            assert used < 70
            assert shown(answer, "tokens")[:2] == ("100", str(100 - 1 - 60))
            wait_until(lambda: left_of(generate(client, "ada", max_tokens=300)) >= 100 - used, "some to be given back")
            assert "100 tokens a minute" in refused(generate(client, "ada", max_tokens=60))["message"]
            assert chat(client, max_tokens=1, stream=True).status_code == 200

    def test_what_the_engine_never_saw_costs_no_tokens(self, limited: Limited, fake_engine: FakeEngine) -> None:
        with limited("failures", key_tokens=100) as client:
            fake_engine.knobs.status = 500
            for status in (503, 503, 404, 503):
                wanted = {"personalize": "merged"} if status == 404 else {}
                wait_until(
                    lambda status=status, wanted=wanted: (
                        generate(client, "ada", max_tokens=90, **wanted).status_code == status
                    ),
                    "all tokens to be left",
                )

    def test_who_leaves_a_whole_answer_midway_is_charged_for_it(
        self, limited: Limited, fake_engine: FakeEngine
    ) -> None:
        with limited("leavers", key_tokens=100) as client:
            fake_engine.knobs.token_delay_s = 0.05
            with pytest.raises(httpx.ReadTimeout):
                client.post("/generate", json={"user_id": "ada", "prompt": "x", "max_tokens": 60}, timeout=0.5)
            wait_until(lambda: fake_engine.seen[0].aborted, "the engine to be told")
            fake_engine.knobs.token_delay_s = 0.0
            assert 100 - 60 <= left_of(generate(client, "ada", max_tokens=300)) < 100 - 20  # some leaks meanwhile

    def test_requests_about_users_count_and_erasing_does_not(self, limited: Limited) -> None:
        with limited("writes", user_requests=2) as client:
            body = {"items": [{"text": "the sea"}]}
            assert client.put("/users/ada/profile", json=body).status_code == 200
            assert client.post("/users/ada/profile/items", json=body).status_code == 200
            refused(client.get("/users/ada"))
            refused(client.put("/users/ada/profile", json=body))
            assert client.delete("/users/ada").status_code == 200
            assert client.get("/health").status_code == 200

    def test_jobs_a_day_and_no_repeated_or_refused_request_is_one(self, limited: Limited) -> None:
        def adapt(user: str, text: str, **fields: Any) -> httpx.Response:
            body = {"samples": [{"input": "Any plans?", "output": text}], **fields}
            return client.post(f"/users/{user}/adapt", json=body)

        with limited("jobs", user_jobs=2, key_jobs=3) as client:
            assert adapt("ada", " ").status_code == 400
            first = adapt("ada", "the sea").raise_for_status().json()["id"]
            assert adapt("ada", "the sea").json()["id"] == first
            assert adapt("ada", "the sea again").status_code == 202
            assert "2 adapt jobs a day" in refused(adapt("ada", "and again"))["message"]
            assert adapt("ada", "the sea again").status_code == 202  # its answer may have been lost
            assert adapt("kai", "roses", idempotency_key="k").status_code == 202
            assert adapt("kai", "roses", idempotency_key="k").status_code == 202
            assert "3 adapt jobs a day" in refused(adapt("kai", "more roses"))["message"]

    def test_a_job_that_the_store_did_not_take_is_none(self, limited: Limited, monkeypatch: pytest.MonkeyPatch) -> None:
        async def away(*_: object) -> None:
            raise Unavailable("the store cannot be used now")

        body = {"samples": [{"input": "Any plans?", "output": "the sea"}]}
        with limited("jobs-that-failed", user_jobs=1) as client:
            for step in ("job_ids", "submit"):
                with monkeypatch.context() as patched:
                    patched.setattr(Adapting, step, away)
                    assert client.post("/users/ada/adapt", json=body).status_code == 503
            assert client.post("/users/ada/adapt", json=body).status_code == 202

    def test_erasing_counts_only_where_there_was_nobody_and_is_never_refused(
        self, limited: Limited, new_user: NewUser
    ) -> None:
        with limited("erasing", key_requests=50) as client:
            known = [new_user() for _ in range(3)]
            for user in known:
                items = {"items": [{"text": "up at five for the waves"}]}
                client.put(f"/users/{user}/profile", json=items).raise_for_status()
            for user in (known[0], known[0], known[1]):
                assert client.delete(f"/users/{user}").status_code == 200
            assert {client.delete(f"/users/{new_user()}").status_code for _ in range(50)} == {404}
            tries = itertools.count()  # fewer than the limit has room for without what was erased
            wait_until(lambda: client.get(f"/users/{known[2]}").status_code == 429 or next(tries) > 30, "the limit")
            assert next(tries) < 30
            assert "50 requests a minute" in refused(client.get(f"/users/{known[2]}"))["message"]
            assert client.delete(f"/users/{new_user()}").status_code == 404
            assert client.delete(f"/users/{known[2]}").status_code == 200


class TestAtOnce:
    """Requests in progress."""

    def test_of_one_key_only_so_many_over_all_gateways(self, limited: Limited, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.token_delay_s = 0.05
        with (
            limited("at-once", key_concurrent=2) as client,
            limited("at-once", key_concurrent=2) as other,
            ThreadPoolExecutor(2) as many,
        ):
            asked = [many.submit(generate, one, "ada", max_tokens=20) for one in (client, other)]
            wait_until(lambda: len(fake_engine.seen) == 2, "both to be in progress")
            for one in (client, other):
                assert "2 requests of this API key" in refused(generate(one, "kai"))["message"]
            assert {answer.result().status_code for answer in asked} == {200}
            wait_until(lambda: generate(other, "kai").status_code == 200, "a place to be free")

    def test_openai_s_client_comes_back(self, limited: Limited, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.token_delay_s = 0.05
        with limited("official", key_concurrent=1) as client, ThreadPoolExecutor(1) as beside:
            slow = beside.submit(generate, client, "ada", max_tokens=10)
            wait_until(lambda: len(fake_engine.seen) == 1, "the place to be taken")
            with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as impatient:
                with pytest.raises(openai.RateLimitError) as error:
                    impatient.chat.completions.create(model="mta", messages=HELLO, max_tokens=4)
                assert error.value.code == "rate_limit_exceeded"
                patient = impatient.with_options(max_retries=5)
                assert patient.chat.completions.create(model="mta", messages=HELLO, max_tokens=4).choices
            assert slow.result().status_code == 200


class TestWithoutTheStore:
    """While nothing can be counted."""

    def test_what_needs_no_profile_is_served_uncounted(
        self, gateway_settings: Settings, fake_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        from bench.rig.valkey import ValkeyProcess

        store = ValkeyProcess(tmp_path_factory.mktemp("away")).start()
        update = {"redis_url": store.url, "key_requests": 1, "key_tokens": 10, "key_concurrent": 1}
        with GatewayThread(gateway_settings.model_copy(update=update)) as gateway, gateway.client() as client:
            assert chat(client, model="base").status_code == 200
            refused(chat(client, model="base"))
            store.kill()
            answers = [chat(client, model="base") for _ in range(2)]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert shown(answers[0], "requests") == (None,) * 3
            assert generate(client, "ada").status_code == 503

    def test_without_a_limit_nothing_is_asked(self, gateway: GatewayThread, client: httpx.Client) -> None:
        from redis import Redis

        with Redis.from_url(gateway.parts.settings.redis_url) as store:
            before = store.info("commandstats")
            for _ in range(3):
                assert chat(client, model="base").status_code == 200
            after = store.info("commandstats")
        calls = {name: stats["calls"] - before.get(name, {"calls": 0})["calls"] for name, stats in after.items()}
        assert not any(calls.get(f"cmdstat_{name}") for name in ("evalsha", "incrby", "script|load"))


class TestLine:
    """More than the engine computes at once."""

    def test_some_wait_and_the_rest_is_refused(self, limited: Limited, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.token_delay_s = 0.02
        with limited("line", engine_places=2, queue_places=3) as client, ThreadPoolExecutor(12) as many:
            answers = list(many.map(lambda n: generate(client, f"u{n}", max_tokens=20, stream=n % 2 == 1), range(12)))
            good = [answer for answer in answers if answer.status_code == 200]
            assert 5 <= len(good) < 12
            waited = [answer for answer in good if "queue;dur=" in answer.headers["Server-Timing"]]
            assert 3 <= len(waited) <= len(good) - 2
            for answer in answers:
                if answer not in good:
                    refused(answer, "overloaded")
            metrics = client.get("/metrics").text.splitlines()
            assert f'mta_shed_total{{reason="queue_full"}} {float(12 - len(good))}' in metrics
            assert {"mta_queue_running 0.0", "mta_queue_waiting 0.0"} <= set(metrics)
            assert f"mta_queue_seconds_count {float(len(good))}" in metrics

    def test_the_engine_never_has_more(self, limited: Limited, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.admit_s = 0.02
        most = 0
        with limited("never-more", engine_places=3, queue_places=20) as client, ThreadPoolExecutor(12) as many:
            asked = [many.submit(generate, client, f"u{n}") for n in range(12)]
            while not all(answer.done() for answer in asked):
                most = max(most, sum(not seen.ended for seen in list(fake_engine.seen)))
            assert {answer.result().status_code for answer in asked} == {200}
        assert 1 <= most <= 3

    def test_a_request_says_how_long_it_waits(self, limited: Limited, fake_engine: FakeEngine) -> None:
        fake_engine.knobs.token_delay_s = 0.05
        with limited("patience", engine_places=1) as client, ThreadPoolExecutor(1) as beside:
            slow = beside.submit(generate, client, "ada", max_tokens=20)
            wait_until(lambda: len(fake_engine.seen) == 1, "the place to be taken")
            for path, body in (
                ("/generate", {"user_id": "kai", "prompt": "hello", "max_tokens": 4}),
                ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 4}),
                ("/v1/completions", {"prompt": "hello", "max_tokens": 4}),
            ):
                refused(client.post(path, json=body, headers={"X-Queue-Timeout": "0.05"}), "overloaded")
                wrong = client.post(path, json=body, headers={"X-Queue-Timeout": "-1"})
                assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "X-Queue-Timeout")
            assert slow.result().status_code == 200

    def test_a_client_that_leaves_while_waiting_frees_its_place(
        self, limited: Limited, fake_engine: FakeEngine
    ) -> None:
        fake_engine.knobs.token_delay_s = 0.05
        with limited("leaving", engine_places=1, queue_places=1) as client, ThreadPoolExecutor(1) as beside:
            slow = beside.submit(generate, client, "ada", max_tokens=40)
            wait_until(lambda: len(fake_engine.seen) == 1, "the place to be taken")
            with pytest.raises(httpx.ReadTimeout):
                client.post("/generate", json={"user_id": "kai", "prompt": "x"}, timeout=0.3)
            assert generate(client, "rosa").status_code == 200  # it waited where kai had
            assert slow.result().status_code == 200
            assert len(fake_engine.seen) == 2
