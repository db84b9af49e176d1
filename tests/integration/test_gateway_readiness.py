"""`/health` and `/ready`: what a gateway says of its parts, above all of several engines."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bank.manifest import read_manifest
from bench.rig.processes import PATIENCE_S, wait_until
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready


def test_a_gateway_whose_parts_are_all_well_is_ready(client: httpx.Client, gateway_settings: Settings) -> None:
    wait_until_ready(client)
    answer = client.get("/ready").raise_for_status().json()
    manifest = read_manifest(gateway_settings.bank)
    assert (answer["status"], answer["detail"]) == ("ready", None)
    assert {name: part["status"] for name, part in answer["parts"].items() if name != "engines"} == {
        "bank": "ok",
        "embedder": "ok",
        "redis": "ok",
        "engine_url": "ok",
    }
    assert answer["parts"]["bank"]["fingerprint"] == manifest.fingerprint
    assert answer["parts"]["redis"]["durability"] == "appendfsync always"
    [engine] = answer["parts"]["engines"]
    assert (engine["url"], engine["status"], engine["max_model_len"]) == (gateway_settings.engine_url, "ok", 512)


def test_health_is_200_whatever_the_parts(client: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.knobs.banks = ()
    try:
        wait_until(lambda: client.get("/ready").status_code == 503, "the gateway to find out")
        answer = client.get("/health").raise_for_status().json()
        assert answer["status"] == "ok"
        assert answer["parts"]["engines"][0]["status"] == "other_bank"  # as last seen
    finally:
        fake_engine.knobs.banks = (client.get("/health").json()["parts"]["bank"]["fingerprint"],)
        wait_until_ready(client)


class Readiness:
    """What `/ready` says of one gateway.

    Args:
        client: of the gateway.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def ask(self) -> tuple[int, Any]:
        """Status and body."""
        response = self._client.get("/ready")
        return response.status_code, response.json()

    def becomes(self, status: int, **engines: str) -> list[Any]:
        """Wait until it answers with a status and says this of its engines, `first` and `second`; what it says."""

        def said() -> bool:
            found, body = self.ask()
            states = [engine["status"] for engine in body["parts"]["engines"]]
            return found == status and states == list(engines.values())

        wait_until(said, f"{status} and {engines}")
        found: list[Any] = self.ask()[1]["parts"]["engines"]
        return found


@pytest.mark.usefixtures("quick_looks")
class TestTwoEngines:
    """One of them suffices; each has its state."""

    @pytest.fixture
    def engine(self, gateway_settings: Settings) -> Iterator[FakeEngine]:
        own = FakeEngine().start()
        own.knobs.banks = (read_manifest(gateway_settings.bank).fingerprint,)
        yield own
        own.stop()

    @pytest.fixture
    def router(self) -> Iterator[FakeEngine]:
        """All that is asked of a router, the fake engine has too."""
        own = FakeEngine().start()
        yield own
        own.stop()

    @pytest.fixture
    def ready(
        self, gateway_settings: Settings, router: FakeEngine, engine: FakeEngine, fake_engine: FakeEngine
    ) -> Iterator[Readiness]:
        """A gateway over a router and two engines, of which `engine` is the second."""
        urls = {"engine_url": router.url, "engine_urls": f"{gateway_settings.engine_url}, {engine.url}/"}
        with GatewayThread(gateway_settings.model_copy(update=urls)) as gateway, gateway.client() as client:
            readiness = Readiness(client)
            readiness.becomes(200, first="ok", second="ok")
            yield readiness

    def test_while_one_is_down_the_other_serves(self, ready: Readiness, engine: FakeEngine) -> None:
        engine.stop()
        ready.becomes(200, first="ok", second="unavailable")
        engine.start()
        ready.becomes(200, first="ok", second="ok")

    def test_without_one_that_has_the_bank_the_gateway_is_not_ready(
        self, ready: Readiness, engine: FakeEngine, fake_engine: FakeEngine
    ) -> None:
        ours = engine.knobs.banks
        fake_engine.knobs.banks = ("cd" * 32,)
        engine.stop()
        try:
            ready.becomes(503, first="other_bank", second="unavailable")
        finally:
            fake_engine.knobs.banks = ours
        ready.becomes(200, first="ok", second="unavailable")

    @pytest.mark.parametrize("gone", [False, True])
    def test_without_the_router_before_them_they_are_asked_directly(
        self, ready: Readiness, router: FakeEngine, gone: bool
    ) -> None:
        if gone:
            router.stop()
        else:
            router.knobs.status = 500
        wait_until(lambda: ready.ask()[1]["parts"]["engine_url"]["status"] == "unavailable", "the gateway to see it")
        assert "engines are asked directly" in ready.ask()[1]["detail"]
        ready.becomes(200, first="ok", second="ok")


def test_an_engine_with_another_key_is_not_ready(gateway_settings: Settings, fake_engine: FakeEngine) -> None:
    settings = gateway_settings.model_copy(update={"engine_key": None})
    with GatewayThread(settings) as gateway, gateway.client() as client:
        Readiness(client).becomes(503, first="wrong_key")
        assert client.get("/ready").json()["parts"]["engine_url"]["status"] == "wrong_key"


def test_whoever_asks_whether_the_gateway_is_ready_has_no_part_asked(
    client: httpx.Client, fake_engine: FakeEngine
) -> None:
    wait_until_ready(client)
    before = fake_engine.looks
    for _ in range(200):
        client.get("/ready").raise_for_status()
    assert fake_engine.looks - before < 100  # it is looked at in the background, every other second


def test_before_the_parts_were_seen_the_gateway_is_not_ready(
    gateway_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.gateway.operating.health.PROBE_TIMEOUT_S", 10 * PATIENCE_S)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            GatewayThread(gateway_settings.model_copy(update={"engine_url": url})) as gateway,
            gateway.client() as client,
        ):
            response = client.get("/ready")
    body = response.json()
    assert (response.status_code, body["status"], body["seen_s_ago"]) == (503, "not_yet_seen", None)
    assert {body["parts"][name]["status"] for name in ("redis", "engine_url")} == {"not_yet_seen"}


@pytest.mark.usefixtures("quick_looks")
def test_what_was_seen_too_long_ago_counts_for_nothing(
    gateway_settings: Settings, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.gateway.operating.health.STALE_AFTER_S", 3.0)
    with GatewayThread(gateway_settings) as gateway, gateway.client() as client:
        wait_until_ready(client)
        let_go = threading.Event()

        async def hang() -> None:
            while not let_go.is_set():
                await asyncio.sleep(0.05)
            raise KeyError("a fault of ours")

        with monkeypatch.context() as patch:
            patch.setattr(gateway.parts.health, "_probe_store", hang)
            wait_until(lambda: client.get("/ready").json()["status"] == "stale", "the state to be too old")
            response = client.get("/ready")
            assert response.status_code == 503
            assert "watch" in response.json()["detail"]
            assert client.get("/health").status_code == 200
        let_go.set()
        wait_until_ready(client)  # a fault in one round does not end the watch
