"""`/health`, `/ready`, `/metrics`, and a gateway whose store is away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bank.manifest import read_manifest
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread
from tests.support.processes import wait_until
from tests.support.valkey import DURABLE, ValkeyProcess

NewUser = Callable[[], str]


def test_a_gateway_whose_parts_are_all_well_is_ready(client: httpx.Client, gateway_settings: Settings) -> None:
    answer = client.get("/ready").raise_for_status().json()
    manifest = read_manifest(gateway_settings.bank)
    assert answer["status"] == "ready"
    assert {name: part["status"] for name, part in answer["parts"].items() if name != "engines"} == {
        "bank": "ok",
        "embedder": "ok",
        "redis": "ok",
    }
    assert answer["parts"]["bank"]["fingerprint"] == manifest.fingerprint
    assert answer["parts"]["redis"]["durability"] == "appendfsync always"
    [engine] = answer["parts"]["engines"]
    assert (engine["url"], engine["status"], engine["max_model_len"]) == (gateway_settings.engine_url, "ok", 512)


def test_health_is_200_whatever_the_parts(client: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.knobs.banks = ()
    try:
        assert client.get("/ready").status_code == 503
        answer = client.get("/health").raise_for_status().json()
        assert answer["status"] == "ok"
        assert answer["parts"]["engines"][0]["status"] == "other_bank"  # as last seen
    finally:
        fake_engine.knobs.banks = (client.get("/health").json()["parts"]["bank"]["fingerprint"],)


class TestNotReady:
    """Each engine fault by its name."""

    @pytest.fixture
    def engine(self, gateway_settings: Settings) -> Iterator[FakeEngine]:
        own = FakeEngine().start()
        own.knobs.banks = (read_manifest(gateway_settings.bank).fingerprint,)
        yield own
        own.stop()

    @pytest.fixture
    def ready(self, gateway_settings: Settings, engine: FakeEngine) -> Iterator[Callable[[], tuple[int, Any]]]:
        """Asks a gateway over two engines, of which `engine` is the second."""
        urls = f"{gateway_settings.engine_url}, {engine.url}/"
        with (
            GatewayThread(gateway_settings.model_copy(update={"engine_urls": urls})) as gateway,
            gateway.client() as client,
        ):

            def ask() -> tuple[int, Any]:
                response = client.get("/ready")
                return response.status_code, response.json()["parts"]["engines"][1]

            yield ask

    def test_all_well(self, ready: Callable[[], tuple[int, Any]], fake_engine: FakeEngine) -> None:
        assert ready()[0] == 200

    def test_an_engine_with_another_bank(
        self, ready: Callable[[], tuple[int, Any]], engine: FakeEngine, fake_engine: FakeEngine
    ) -> None:
        engine.knobs.banks = ("ab" * 32,)
        status, state = ready()
        assert (status, state["status"]) == (503, "other_bank")
        assert "abababab" in state["detail"]

    def test_an_engine_with_two_banks_one_of_them_ours(
        self, ready: Callable[[], tuple[int, Any]], engine: FakeEngine, fake_engine: FakeEngine
    ) -> None:
        engine.knobs.banks = ("ab" * 32, *engine.knobs.banks)
        assert ready()[0] == 200

    def test_an_engine_that_is_down(
        self, ready: Callable[[], tuple[int, Any]], engine: FakeEngine, fake_engine: FakeEngine
    ) -> None:
        engine.stop()
        status, state = ready()
        assert (status, state["status"]) == (503, "unavailable")
        engine.start()
        assert ready()[0] == 200


def test_an_engine_with_another_key_is_not_ready(gateway_settings: Settings, fake_engine: FakeEngine) -> None:
    settings = gateway_settings.model_copy(update={"engine_key": None})
    with GatewayThread(settings) as gateway, gateway.client() as client:
        response = client.get("/ready")
        assert response.status_code == 503
        assert response.json()["parts"]["engines"][0]["status"] == "wrong_key"


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
        assert client.get("/ready").json()["parts"]["redis"]["status"] == "unavailable"
        assert client.post("/generate", json=generation | {"personalize": "none"}).status_code == 200
        store.start()
        level = client.post("/generate", json=generation).raise_for_status().json()["personalization"]["level"]
        assert level == "merged"
        assert client.get("/ready").status_code == 200


def test_a_store_that_may_lose_writes_is_noted_when_that_was_accepted(
    gateway_settings: Settings, tmp_path: Path, fake_engine: FakeEngine
) -> None:
    volatile = ValkeyProcess(tmp_path, ("--appendonly", "no")).start()
    update = {"redis_url": volatile.url, "require_durable_store": False}
    try:
        with GatewayThread(gateway_settings.model_copy(update=update)) as gateway, gateway.client() as client:
            state = client.get("/ready").raise_for_status().json()["parts"]["redis"]
            assert (state["status"], state["durability"]) == ("ok", "none")
            assert "MTA_REQUIRE_DURABLE_STORE" in state["detail"]
    finally:
        volatile.kill()


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

    def test_each_stage_has_its_histogram(self, client: httpx.Client, new_user: NewUser) -> None:
        user_id = new_user()
        client.put(f"/users/{user_id}/profile", json={"items": [{"text": "x"}]}).raise_for_status()
        request = {"user_id": user_id, "prompt": "x", "max_tokens": 1, "stream": True}
        client.post("/generate", json=request).raise_for_status()
        for stage in ("profile", "recipe", "engine_ttft", "engine", "total"):
            assert value(client, f'mta_stage_seconds_count{{stage="{stage}"}}') > 0


def series(client: httpx.Client) -> set[str]:
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def value(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)
