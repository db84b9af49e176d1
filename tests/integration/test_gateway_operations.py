"""`/health`, `/ready`, `/metrics`, HEAD, and a gateway whose store is away or full."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from bank.manifest import read_manifest
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.settings import Settings
from tests.support.calls import NewUser, adapt, put, who
from tests.support.fake_engine import FakeEngine, Knobs
from tests.support.gateway import GatewayThread, becomes, generate, metric, serving, wait_until_ready


def test_ready_gateway_says_so_without_probing_its_parts(
    client: httpx.Client, gateway_settings: Settings, fake_engine: FakeEngine
) -> None:
    wait_until_ready(client)
    before = fake_engine.looks
    for _ in range(100):
        client.get("/ready").raise_for_status()
    assert fake_engine.looks - before < 50  # the background probes a few times a second
    answer = client.get("/ready").raise_for_status().json()
    manifest = read_manifest(gateway_settings.bank)
    assert (answer["status"], answer["detail"]) == ("ready", None)
    assert {part["status"] for name, part in answer["parts"].items() if name != "engines"} == {"ok"}
    assert answer["parts"].keys() == {"bank", "embedder", "redis", "engine_url", "engines"}
    assert answer["parts"]["bank"]["fingerprint"] == manifest.fingerprint
    assert answer["parts"]["redis"]["durability"] == "appendfsync always"
    [engine] = answer["parts"]["engines"]
    assert (engine["url"], engine["status"], engine["max_model_len"]) == (gateway_settings.engine_url, "ok", 512)


def test_one_of_two_engines_suffices_even_without_a_router(gateway_settings: Settings, fake_engine: FakeEngine) -> None:
    ours = (read_manifest(gateway_settings.bank).fingerprint,)
    engine, router = FakeEngine(Knobs(banks=ours)).start(), FakeEngine().start()  # it has all that a router is asked
    urls = {"engine_url": router.url, "engine_urls": f"{gateway_settings.engine_url}, {engine.url}/"}
    with GatewayThread(gateway_settings, **urls) as gateway, gateway.client() as client:
        for is_gone in (False, True):
            becomes(client, 200, "ok", "ok", detail="None")
            if is_gone:
                router.stop()
            else:
                router.knobs.status = 500
            answer = becomes(client, 200, "ok", "ok", detail="the gateway calls engines directly")
            assert answer["parts"]["engine_url"]["status"] == "unavailable"
            router.reset()
        engine.stop()
        becomes(client, 200, "ok", "unavailable")
        fake_engine.knobs.banks = ("cd" * 32,)
        try:
            becomes(client, 503, "other_bank", "unavailable")
            health = client.get("/health").raise_for_status().json()
            assert (health["status"], health["parts"]["engines"][0]["status"]) == ("ok", "other_bank")
        finally:
            fake_engine.knobs.banks = ours
        engine.start()
        becomes(client, 200, "ok", "ok")
    engine.stop()


def test_an_engine_with_another_key_is_not_ready(gateway_settings: Settings, fake_engine: FakeEngine) -> None:
    with GatewayThread(gateway_settings, engine_key=None) as gateway, gateway.client() as client:
        assert becomes(client, 503, "wrong_key")["parts"]["engine_url"]["status"] == "wrong_key"


def test_before_the_first_probe_it_is_not_ready(gateway_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.gateway.operating.health.PROBE_TIMEOUT_S", 10 * PATIENCE_S)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with GatewayThread(gateway_settings, engine_url=url) as gateway:
            response = httpx.get(f"{gateway.url}/ready")
    body = response.json()
    assert (response.status_code, body["status"], body["seen_s_ago"]) == (503, "not_yet_seen", None)
    assert {body["parts"][name]["status"] for name in ("redis", "engine_url")} == {"not_yet_seen"}


def test_a_stale_probe_counts_for_nothing(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_ready(client)
    with monkeypatch.context() as patch:
        patch.setattr("server.gateway.operating.health.STALE_AFTER_S", 0.0)
        response = client.get("/ready")
        assert (response.status_code, response.json()["status"]) == (503, "stale")
        assert "probe" in response.json()["detail"]
        assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200


ROOM = 8 << 20  # bytes, of a store that is soon full


@contextmanager
def over_a_store(settings: Settings, folder: Path, *options: str, **given: object) -> Iterator[tuple[Any, ...]]:
    """A client of a gateway over a Valkey of its own, and the Valkey, whose rewrite is late."""
    now_ms = time.time_ns() // 1_000_000
    with ValkeyProcess(folder, options or DURABLE) as store:
        with redis.Redis.from_url(store.url) as raw:
            raw.hset("mta:{rewrite}", mapping={"first": now_ms - 7_200_000, "asked": now_ms - 7_200_000})
        with serving(settings, redis_url=store.url, **given) as client:
            yield client, store


def test_while_the_store_is_away_only_the_base_model_answers(
    gateway_settings: Settings, tmp_path: Path, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id, items = new_user(), {"items": [{"text": "the sea"}]}
    with over_a_store(gateway_settings, tmp_path) as (client, store):
        put(client, user_id, items["items"])
        store.kill()
        for response in (
            client.put(f"/users/{user_id}/profile", json=items),
            client.post(f"/users/{user_id}/profile/items", json=items),
            client.get(f"/users/{user_id}"),
            client.delete(f"/users/{user_id}"),
            generate(client, user_id),
            generate(client, user_id, stream=True),
        ):
            is_refused(response, "store_unavailable")
        assert fake_engine.seen == []
        wait_until(lambda: client.get("/ready").status_code == 503, "the gateway to find out")
        assert client.get("/ready").json()["parts"]["redis"]["status"] == "unavailable"
        assert generate(client, user_id, personalize="none").status_code == 200
        store.start()
        assert who(generate(client, user_id))["level"] == "merged"
        wait_until_ready(client)


def test_a_full_store_refuses_only_what_would_be_stored(
    gateway_settings: Settings, tmp_path: Path, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    def store(items: int, size: int) -> httpx.Response:
        stored.append(new_user())
        body = {"items": [{"text": str(number) * size} for number in range(items)]}
        return client.put(f"/users/{stored[-1]}/profile", json=body)

    def detail() -> str | None:
        return client.get("/ready").raise_for_status().json()["detail"]

    stored: list[str] = []
    with over_a_store(gateway_settings, tmp_path, *DURABLE, "--maxmemory", str(ROOM)) as (client, _):
        assert detail() is None
        for items, size in ((5, 40_000), (1, 4_000)):
            while (refused := store(items, size)).status_code == httpx.codes.OK:
                pass
        is_refused(refused, "store_full")
        for number in itertools.count():  # until what the store's own buffers gave back is used up
            item = {"items": [{"text": f"{number} " + "x" * 4_000}]}
            refused = client.post(f"/users/{stored[0]}/profile/items", json=item)
            if refused.status_code != httpx.codes.OK:
                break
        is_refused(refused, "store_full")
        wait_until(lambda: (detail() or "").startswith("store_full: "), "the gateway to find out")
        ready = client.get("/ready").json()
        assert (ready["status"], ready["parts"]["redis"]["status"]) == ("ready", "full")
        assert metric(client, "mta_store_max_bytes") == ROOM
        assert metric(client, "mta_store_used_bytes") > 0.99 * ROOM
        assert metric(client, "mta_store_resident_bytes") > 0
        assert metric(client, 'mta_store_commands_total{command="eval",server=""}') > 0
        assert who(generate(client, stored[0]))["level"] == "merged"
        for user_id in stored[1:4]:
            assert client.delete(f"/users/{user_id}").raise_for_status().json()["erased"]["items"] == 5
        wait_until(lambda: detail() is None, "the gateway to find room")
        assert store(1, 4_000).status_code == httpx.codes.OK


def test_a_volatile_store_or_late_rewrite(gateway_settings: Settings, tmp_path: Path, fake_engine: FakeEngine) -> None:
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
    def test_labels_do_not_grow_with_users_recipes_or_paths(self, client: httpx.Client, new_user: NewUser) -> None:
        def exercise(rounds: int) -> None:
            for number in range(rounds):
                user_id = new_user()
                put(client, user_id, [{"text": f"{user_id} {number}"}])
                generate(client, user_id)
                client.get(f"/users/{user_id}")
                client.get(f"/no/such/{user_id}")
                client.request("PROPFIND" if number % 2 else "PATCH", f"/users/{user_id}")

        exercise(4)
        series(client)  # asking is counted too
        before = series(client)
        exercise(12)
        assert series(client) == before

    def test_generations_are_counted(self, client: httpx.Client, fake_engine: FakeEngine, new_user: NewUser) -> None:
        user_id = new_user()
        ends = {("base", "answered"): 2, ("base", "broken"): 1, ("", "refused"): 1, ("", "unavailable"): 1}
        series = 'mta_generations_total{{level="{}",outcome="{}",tenant="default"}}'
        counted = {series.format(*end): times for end, times in ends.items()} | {
            'mta_requests_total{level="base",method="POST",route="/generate",status="200"}': 3,
            'mta_tokens_total{kind="completion",level="base"}': 8,
            "mta_disconnects_total": 0,
            'mta_ttft_seconds_count{level="base"}': 2,
            "mta_inter_token_seconds_count": 3,
        }
        with grown(client, counted):
            for stream in (False, True):
                generate(client, user_id, stream=stream).raise_for_status()
            generate(client, user_id, prompt=7)
            fake_engine.turn(die_after=1)
            generate(client, user_id, stream=True)
            fake_engine.turn(die_after=None, status=500)
            generate(client, user_id)
        for stage in ("profile", "engine_ttft", "engine", "total"):
            assert metric(client, f'mta_stage_seconds_count{{stage="{stage}"}}') > 0
        written = 'mta_store_seconds_count{kind="write",outcome="ok"}'
        before = metric(client, written)
        put(client, new_user())
        wait_until(lambda: metric(client, written) > before, "the write to be counted")  # the gateway's loops write too
        assert metric(client, 'mta_store_seconds_count{kind="command",outcome="ok"}') > 0

    def test_engines_figures_are_shown_as_far_as_reported(self, client: httpx.Client, fake_engine: FakeEngine) -> None:
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
        user_id = new_user()
        adapt(client, user_id).raise_for_status()
        wait_until(lambda: metric(client, 'mta_jobs{state="queued"}') > before, "the job to be counted")
        client.delete(f"/users/{user_id}").raise_for_status()
        wait_until(lambda: metric(client, 'mta_jobs{state="queued"}') == before, "the job to be gone")


@contextmanager
def grown(client: httpx.Client, by: Mapping[str, float]) -> Iterator[None]:
    """While time series grow by so much; a request is counted a moment after its client has all of the answer."""
    before = {name: metric(client, name) for name in by}
    yield
    wait_until(lambda: all(metric(client, name) == before[name] + by[name] for name in by), f"{by} to be counted")


def series(client: httpx.Client) -> set[str]:
    """All time series but those of the store's own commands, some of which only the gateway's loops send."""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith(("#", "mta_store_"))}


def test_who_follows_a_job_is_told_when_the_gateway_stops(gateway_settings: Settings, client: httpx.Client) -> None:
    job = adapt(client, "followed").raise_for_status().json()["id"]
    events = f"/jobs/{job}/events"
    with GatewayThread(gateway_settings) as gateway, gateway.client() as mine, mine.stream("GET", events) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: job"
        gateway.stop()
        *_, last = filter(None, lines)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"


class TestHead:
    @pytest.fixture
    def job(self, client: httpx.Client, ada: str) -> str:
        return str(adapt(client, ada).raise_for_status().json()["id"])

    @pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/users/{user}", "/users/nobody", "/jobs/{job}"])
    def test_status_and_headers_are_those_of_get(self, client: httpx.Client, ada: str, job: str, path: str) -> None:
        path = path.format(user=ada, job=job)
        got, headed = client.get(path), client.head(path)
        assert (headed.status_code, headed.content) == (got.status_code, b"")
        changing = dict.fromkeys({"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set()))
        assert dict(headed.headers) | changing == dict(got.headers) | changing

    def test_events_are_not_waited_for(self, client: httpx.Client, job: str) -> None:
        response = client.head(f"/jobs/{job}/events").raise_for_status()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        series = 'mta_requests_total{level="",method="HEAD",route="/jobs/{job_id}/events",status="200"}'
        wait_until(lambda: metric(client, series) > 0, "the request to be over")

    def test_every_method_of_a_path_is_listed(self, client: httpx.Client) -> None:
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            allowed = client.options(path.replace("{job_id}", "a.1")).headers["Allow"].split(", ")
            assert sorted(allowed) == sorted(method.upper() for method in methods)

    def test_only_routes_with_get_have_it_and_the_document_omits_it(self, client: httpx.Client) -> None:
        for response in (client.head("/generate"), client.get("/generate")):
            assert (response.status_code, response.headers["Allow"]) == (405, "POST")
        paths = client.get("/openapi.json").json()["paths"]
        assert not [path for path, methods in paths.items() if "head" in methods]
