"""A gateway whose store is away or full, and `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import redis

from bench.rig.processes import wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, metric, wait_until_ready

NewUser = Callable[[], str]
ROOM = 8 << 20
"""Of a store that is soon full, in bytes."""


@contextmanager
def over_a_store(settings: Settings, folder: Path, *options: str, **given: object) -> Iterator[tuple[Any, ...]]:
    """A client of a gateway over a Valkey of its own, and that, which holds users beyond the time that was promised."""
    store, now_ms = ValkeyProcess(folder, options or DURABLE).start(), time.time_ns() // 1_000_000
    with redis.Redis.from_url(store.url) as raw:
        late = {"due": now_ms - 3_600_000, "failures": 9, "retry": now_ms + 3_000_000}
        raw.hset("mta:{rewrite}", mapping=late)
    try:
        settings = settings.model_copy(update={"redis_url": store.url, **given})
        with GatewayThread(settings) as gateway, gateway.client() as client:
            wait_until_ready(client)
            yield client, store
    finally:
        store.kill()


def test_while_the_store_is_away_requests_that_need_it_are_told_to_come_back(
    gateway_settings: Settings, tmp_path: Path, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id, items = new_user(), {"items": [{"text": "the sea"}]}
    generation = {"user_id": user_id, "prompt": "x", "max_tokens": 1}
    with over_a_store(gateway_settings, tmp_path) as (client, store):
        client.put(f"/users/{user_id}/profile", json=items).raise_for_status()
        store.kill()
        for response in (
            client.put(f"/users/{user_id}/profile", json=items),
            client.post(f"/users/{user_id}/profile/items", json=items),
            client.get(f"/users/{user_id}"),
            client.delete(f"/users/{user_id}"),
            client.post("/generate", json=generation),
            client.post("/generate", json=generation | {"stream": True}),
        ):
            is_refused(response, "store_unavailable")
        assert fake_engine.seen == []
        wait_until(lambda: client.get("/ready").status_code == 503, "the gateway to find out")
        assert client.get("/ready").json()["parts"]["redis"]["status"] == "unavailable"
        assert client.post("/generate", json=generation | {"personalize": "none"}).status_code == 200
        store.start()
        level = client.post("/generate", json=generation).raise_for_status().json()["personalization"]["level"]
        assert level == "merged"
        wait_until_ready(client)


def test_while_the_store_is_full_what_would_be_stored_is_refused_and_all_else_goes_on(
    gateway_settings: Settings, tmp_path: Path, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    def put(items: int, size: int) -> httpx.Response:
        stored.append(new_user())
        body = {"items": [{"text": str(number) * size} for number in range(items)]}
        return client.put(f"/users/{stored[-1]}/profile", json=body)

    def detail() -> str | None:
        found: str | None = client.get("/ready").raise_for_status().json()["detail"]
        return found

    stored: list[str] = []
    with over_a_store(gateway_settings, tmp_path, *DURABLE, "--maxmemory", str(ROOM)) as (client, _):
        assert detail() is None
        for items, size in ((5, 40_000), (1, 4_000)):
            while (refused := put(items, size)).status_code == httpx.codes.OK:
                pass
        item = {"items": [{"text": "x" * 4_000}]}
        for response in (refused, client.post(f"/users/{stored[0]}/profile/items", json=item)):
            is_refused(response, "store_full")
        wait_until(lambda: detail() is not None, "the gateway to find out")
        assert (detail() or "").startswith("store_full: ")
        ready = client.get("/ready").json()
        assert (ready["status"], ready["parts"]["redis"]["status"]) == ("ready", "full")
        assert metric(client, "mta_store_max_bytes") == ROOM
        assert metric(client, "mta_store_used_bytes") > 0.99 * ROOM
        answer = client.post("/generate", json={"user_id": stored[0], "prompt": "x", "max_tokens": 1})
        assert answer.raise_for_status().json()["personalization"]["level"] == "merged"
        for user_id in stored[:3]:
            assert client.delete(f"/users/{user_id}").raise_for_status().json()["erased"]["items"] == 5
        wait_until(lambda: detail() is None, "the gateway to find room")
        assert put(1, 4_000).status_code == httpx.codes.OK


def test_a_store_that_may_lose_writes_is_noted_when_that_was_accepted_and_a_late_rewrite_is_shown(
    gateway_settings: Settings, tmp_path: Path, fake_engine: FakeEngine
) -> None:
    volatile = ("--appendonly", "no")
    with over_a_store(gateway_settings, tmp_path, *volatile, require_durable_store=False) as (client, _):
        state = client.get("/ready").raise_for_status().json()["parts"]["redis"]
        assert (state["status"], state["durability"]) == ("ok", "none")
        assert "MTA_REQUIRE_DURABLE_STORE" in state["detail"]
        wait_until(lambda: metric(client, "mta_rewrite_overdue_seconds") > 2000, "the gateway to look")


def is_refused(response: httpx.Response, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    assert int(response.headers["Retry-After"]) > 0


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

        exercise(4)
        series(client)  # asking is counted too
        before = series(client)
        exercise(12)
        assert series(client) == before

    def test_generations_are_counted_by_route_level_and_how_they_ended(
        self, client: httpx.Client, fake_engine: FakeEngine, new_user: NewUser
    ) -> None:
        request = {"user_id": new_user(), "prompt": "x", "max_tokens": 3}
        ends = {("base", "answered"): 2, ("base", "broken"): 1, ("", "refused"): 1, ("", "unavailable"): 1}
        with grown(
            client,
            {
                **{
                    f'mta_generations_total{{level="{level}",outcome="{end}",tenant="default"}}': times
                    for (level, end), times in ends.items()
                },
                'mta_requests_total{level="base",method="POST",route="/generate",status="200"}': 3,
                'mta_tokens_total{kind="completion",level="base"}': 6,
                "mta_disconnects_total": 0,
            },
        ):
            for stream in (False, True):
                client.post("/generate", json=request | {"stream": stream}).raise_for_status()
            client.post("/generate", json=request | {"prompt": 7})
            fake_engine.knobs.die_after = 1
            client.post("/generate", json=request | {"stream": True})
            fake_engine.knobs.die_after = None
            fake_engine.knobs.status = 500
            client.post("/generate", json=request)

    def test_first_tokens_are_timed_by_level_and_the_time_between_tokens_and_the_store_s(
        self, client: httpx.Client, new_user: NewUser
    ) -> None:
        request = {"user_id": new_user(), "prompt": "x", "max_tokens": 5, "stream": True}
        with grown(client, {'mta_ttft_seconds_count{level="base"}': 1, "mta_inter_token_seconds_count": 4}):
            client.post("/generate", json=request).raise_for_status()
        for stage in ("profile", "engine_ttft", "engine", "total"):
            assert metric(client, f'mta_stage_seconds_count{{stage="{stage}"}}') > 0
        with grown(client, {'mta_store_seconds_count{kind="write",outcome="ok"}': 1}):
            client.put(f"/users/{new_user()}/profile", json={"items": [{"text": "x"}]}).raise_for_status()
        assert metric(client, 'mta_store_seconds_count{kind="command",outcome="ok"}') > 0

    def test_engines_slots_and_prepares_are_shown_as_far_as_they_say(
        self, client: httpx.Client, fake_engine: FakeEngine
    ) -> None:
        fake_engine.knobs.figures = {"slots_taken": 3, "prepares": 10, "fuses": 4}
        wait_until(lambda: metric(client, 'mta_engine_slots_resident{engine="0"}') == 3, "the gateway to look")
        assert metric(client, 'mta_engine_slots{engine="0"}') == 8
        assert metric(client, 'mta_engine_prepares_total{engine="0",kind="cold"}') == 4
        assert metric(client, 'mta_engine_prepares_total{engine="0",kind="warm"}') == 6
        fake_engine.knobs.figures = {}
        wait_until(lambda: not any("slots_resident" in name for name in series(client)), "the gateway to look again")
        assert metric(client, 'mta_engine_up{engine="0"}') == 1

    def test_jobs_are_counted_until_they_end(self, client: httpx.Client, new_user: NewUser) -> None:
        before = metric(client, 'mta_jobs{state="queued"}')
        samples = [{"input": "q", "output": "a"}]
        user_id = new_user()
        client.post(f"/users/{user_id}/adapt", json={"samples": samples}).raise_for_status()
        wait_until(lambda: metric(client, 'mta_jobs{state="queued"}') > before, "the job to be counted")
        client.delete(f"/users/{user_id}").raise_for_status()
        wait_until(lambda: metric(client, 'mta_jobs{state="queued"}') == before, "the job to be gone")


@contextmanager
def grown(client: httpx.Client, by: Mapping[str, float]) -> Iterator[None]:
    """While time series grow by so much; a request is counted a moment after its client has all of the answer."""
    before = {name: metric(client, name) for name in by}
    yield
    wait_until(
        lambda: all(metric(client, name) == before[name] + more for name, more in by.items()), f"{by} to be counted"
    )


def series(client: httpx.Client) -> set[str]:
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}
