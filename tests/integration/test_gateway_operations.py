"""A gateway whose store is away or full, and `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from bench.rig.processes import wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready

NewUser = Callable[[], str]


@pytest.mark.usefixtures("quick_looks")
class TestStoreAway:
    """The store dies, and comes back."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ValkeyProcess]:
        own = ValkeyProcess(tmp_path, DURABLE).start()
        yield own
        own.kill()

    @pytest.fixture
    def client(
        self, gateway_settings: Settings, store: ValkeyProcess, fake_engine: FakeEngine
    ) -> Iterator[httpx.Client]:
        settings = gateway_settings.model_copy(update={"redis_url": store.url})
        with GatewayThread(settings) as gateway, gateway.client() as client:
            yield client

    def test_requests_that_need_it_are_told_to_come_back(
        self, client: httpx.Client, store: ValkeyProcess, new_user: NewUser, fake_engine: FakeEngine
    ) -> None:
        user_id, items = new_user(), {"items": [{"text": "the sea"}]}
        generation = {"user_id": user_id, "prompt": "x", "max_tokens": 1}
        client.put(f"/users/{user_id}/profile", json=items).raise_for_status()
        store.kill()
        refused = [
            client.put(f"/users/{user_id}/profile", json=items),
            client.post(f"/users/{user_id}/profile/items", json=items),
            client.get(f"/users/{user_id}"),
            client.delete(f"/users/{user_id}"),
            client.post("/generate", json=generation),
            client.post("/generate", json=generation | {"stream": True}),
        ]
        for response in refused:
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) > 0
            assert response.json()["error"]["code"] == "store_unavailable"
        assert fake_engine.seen == []
        wait_until(lambda: client.get("/ready").status_code == 503, "the gateway to find out")
        assert client.get("/ready").json()["parts"]["redis"]["status"] == "unavailable"
        assert client.post("/generate", json=generation | {"personalize": "none"}).status_code == 200
        store.start()
        level = client.post("/generate", json=generation).raise_for_status().json()["personalization"]["level"]
        assert level == "merged"
        wait_until_ready(client)


@pytest.mark.usefixtures("quick_looks")
class TestStoreFull:
    """The store is at its `maxmemory`."""

    ROOM = 8 << 20

    @pytest.fixture
    def client(self, gateway_settings: Settings, tmp_path: Path, fake_engine: FakeEngine) -> Iterator[httpx.Client]:
        store = ValkeyProcess(tmp_path, (*DURABLE, "--maxmemory", str(self.ROOM))).start()
        settings = gateway_settings.model_copy(update={"redis_url": store.url})
        with GatewayThread(settings) as gateway, gateway.client() as client:
            wait_until_ready(client)
            yield client
        store.kill()

    def test_what_would_be_stored_is_refused_and_all_else_goes_on(
        self, client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
    ) -> None:
        def put(items: int, size: int) -> httpx.Response:
            stored.append(new_user())
            body = {"items": [{"text": str(number) * size} for number in range(items)]}
            return client.put(f"/users/{stored[-1]}/profile", json=body)

        stored: list[str] = []
        assert client.get("/ready").json()["detail"] is None
        for items, size in ((5, 40_000), (1, 4_000)):
            while (refused := put(items, size)).status_code == httpx.codes.OK:
                pass
        item = {"items": [{"text": "x" * 4_000}]}
        for response in (refused, client.post(f"/users/{stored[0]}/profile/items", json=item)):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "store_full"
            assert int(response.headers["Retry-After"]) > 0
        wait_until(lambda: client.get("/ready").json()["detail"] is not None, "the gateway to find out")
        ready = client.get("/ready").raise_for_status().json()
        assert ready["status"] == "ready"
        assert ready["detail"].startswith("store_full: ")
        assert ready["parts"]["redis"]["status"] == "full"
        assert value(client, "mta_store_max_bytes") == self.ROOM
        assert value(client, "mta_store_used_bytes") > 0.99 * self.ROOM
        answer = client.post("/generate", json={"user_id": stored[0], "prompt": "x", "max_tokens": 1})
        assert answer.raise_for_status().json()["personalization"]["level"] == "merged"
        for user_id in stored[:3]:
            assert client.delete(f"/users/{user_id}").raise_for_status().json()["erased"]["items"] == 5
        wait_until(lambda: client.get("/ready").json()["detail"] is None, "the gateway to find room")
        assert put(1, 4_000).status_code == httpx.codes.OK


def test_a_store_that_may_lose_writes_is_noted_when_that_was_accepted(
    gateway_settings: Settings, tmp_path: Path, fake_engine: FakeEngine
) -> None:
    volatile = ValkeyProcess(tmp_path, ("--appendonly", "no")).start()
    update = {"redis_url": volatile.url, "require_durable_store": False}
    try:
        with GatewayThread(gateway_settings.model_copy(update=update)) as gateway, gateway.client() as client:
            wait_until_ready(client)
            state = client.get("/ready").raise_for_status().json()["parts"]["redis"]
            assert (state["status"], state["durability"]) == ("ok", "none")
            assert "MTA_REQUIRE_DURABLE_STORE" in state["detail"]
    finally:
        volatile.kill()


def test_a_rewrite_that_is_late_is_shown(gateway_settings: Settings, tmp_path: Path, fake_engine: FakeEngine) -> None:
    store, now_ms = ValkeyProcess(tmp_path, DURABLE).start(), time.time_ns() // 1_000_000
    with redis.Redis.from_url(store.url) as raw:
        times = {"due": now_ms - 3_600_000, "failures": 9, "retry": now_ms + 3_000_000}
        raw.hset("mta:{rewrite}", mapping=times)
    try:
        with (
            GatewayThread(gateway_settings.model_copy(update={"redis_url": store.url})) as gateway,
            gateway.client() as client,
        ):
            wait_until(lambda: value(client, "mta_rewrite_overdue_seconds") > 2000, "the gateway to look")
    finally:
        store.kill()


class TestMetrics:
    """What is counted, and that it stays small."""

    def test_labels_do_not_grow_with_users_recipes_or_paths(self, client: httpx.Client, new_user: NewUser) -> None:
        def exercise(rounds: int) -> None:
            for number in range(rounds):
                user_id = new_user()
                items = [{"text": f"{user_id} {number}"}]
                client.put(f"/users/{user_id}/profile", json={"items": items}).raise_for_status()
                client.post("/generate", json={"user_id": user_id, "prompt": "x", "max_tokens": 1})
                client.get(f"/users/{user_id}")
                client.get(f"/no/such/{user_id}")
                client.request("PROPFIND" if number % 2 else "PATCH", f"/users/{user_id}")

        exercise(10)
        series(client)  # asking is counted too
        before = series(client)
        exercise(50)
        assert series(client) == before

    def test_requests_are_counted_by_route_status_and_level(self, client: httpx.Client, new_user: NewUser) -> None:
        series = 'mta_requests_total{level="base",method="POST",route="/generate",status="200"}'
        before = value(client, series)
        client.post("/generate", json={"user_id": new_user(), "prompt": "x", "max_tokens": 1}).raise_for_status()
        # A request is counted when it is over, which is a moment after its client has all of the answer.
        wait_until(lambda: value(client, series) == before + 1, "the request to be counted")

    def test_generations_are_counted_by_level_and_how_they_ended(
        self, client: httpx.Client, fake_engine: FakeEngine, new_user: NewUser
    ) -> None:
        def ended(outcome: str, level: str = "base") -> float:
            name = f'mta_generations_total{{level="{level}",outcome="{outcome}",tenant='
            lines = client.get("/metrics").text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

        request = {"user_id": new_user(), "prompt": "x", "max_tokens": 3}
        before = {outcome: ended(outcome) for outcome in ("answered", "broken")}
        refused, unavailable = ended("refused", ""), ended("unavailable", "")
        tokens = 'mta_tokens_total{kind="completion",level="base"}'
        written = value(client, tokens)
        client.post("/generate", json=request).raise_for_status()
        client.post("/generate", json=request | {"prompt": 7})
        fake_engine.knobs.die_after = 1
        client.post("/generate", json=request | {"stream": True})
        fake_engine.knobs.die_after = None
        fake_engine.knobs.status = 500
        client.post("/generate", json=request)
        wait_until(lambda: ended("unavailable", "") == unavailable + 1, "the last one to be counted")
        assert {outcome: ended(outcome) - was for outcome, was in before.items()} == {"answered": 1, "broken": 1}
        assert ended("refused", "") == refused + 1
        assert value(client, tokens) == written + 3

    def test_the_stores_time_is_counted_by_what_it_did(self, client: httpx.Client, new_user: NewUser) -> None:
        name = 'mta_store_seconds_count{{kind="{}",outcome="ok"}}'
        before = [value(client, name.format(kind)) for kind in ("command", "write")]
        client.put(f"/users/{new_user()}/profile", json={"items": [{"text": "x"}]}).raise_for_status()
        assert value(client, name.format("write")) > before[1]
        assert value(client, name.format("command")) > before[0]

    def test_first_tokens_are_timed_by_level_and_the_time_between_tokens(
        self, client: httpx.Client, new_user: NewUser
    ) -> None:
        first, between = 'mta_ttft_seconds_count{level="base"}', "mta_inter_token_seconds_count"
        before = value(client, first), value(client, between)
        request = {"user_id": new_user(), "prompt": "x", "max_tokens": 5, "stream": True}
        client.post("/generate", json=request).raise_for_status()
        for stage in ("profile", "engine_ttft", "engine", "total"):
            assert value(client, f'mta_stage_seconds_count{{stage="{stage}"}}') > 0
        assert (value(client, first), value(client, between)) == (before[0] + 1, before[1] + 4)

    def test_engines_slots_and_prepares_are_shown_as_far_as_they_say(
        self, client: httpx.Client, fake_engine: FakeEngine
    ) -> None:
        fake_engine.knobs.figures = {"slots_taken": 3, "prepares": 10, "fuses": 4}
        wait_until(lambda: value(client, 'mta_engine_slots_resident{engine="0"}') == 3, "the gateway to look")
        assert value(client, 'mta_engine_slots{engine="0"}') == 8
        assert value(client, 'mta_engine_prepares_total{engine="0",kind="cold"}') == 4
        assert value(client, 'mta_engine_prepares_total{engine="0",kind="warm"}') == 6
        fake_engine.knobs.figures = {}
        wait_until(lambda: not any("slots_resident" in name for name in series(client)), "the gateway to look again")
        assert value(client, 'mta_engine_up{engine="0"}') == 1

    def test_jobs_are_counted_until_they_end(self, client: httpx.Client, new_user: NewUser) -> None:
        before = value(client, 'mta_jobs{state="queued"}')
        samples = [{"input": "q", "output": "a"}]
        user_id = new_user()
        client.post(f"/users/{user_id}/adapt", json={"samples": samples}).raise_for_status()
        wait_until(lambda: value(client, 'mta_jobs{state="queued"}') > before, "the job to be counted")
        client.delete(f"/users/{user_id}").raise_for_status()
        wait_until(lambda: value(client, 'mta_jobs{state="queued"}') == before, "the job to be gone")


def series(client: httpx.Client) -> set[str]:
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def value(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)
