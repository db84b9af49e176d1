"""`/health` and `/ready`: what a gateway says of its parts, above all of several engines."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import httpx
import pytest

from bank.manifest import read_manifest
from bench.rig.processes import PATIENCE_S, wait_until
from server.settings import Settings
from tests.support.fake_engine import FakeEngine, Knobs
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


def parts_of(client: httpx.Client) -> tuple[str | None, Any]:
    """What `/ready` says is missing, and what of each part."""
    answer = client.get("/ready").json()
    return answer["detail"], answer["parts"]


def becomes(client: httpx.Client, status: int, *engines: str) -> None:
    """Wait until a gateway's `/ready` has this status, and says this of its engines."""

    def said() -> bool:
        answer = client.get("/ready")
        states = [engine["status"] for engine in answer.json()["parts"]["engines"]]
        return answer.status_code == status and states == list(engines)

    wait_until(said, f"{status} and {engines}")


def test_one_of_two_engines_suffices_and_the_router_before_them_may_be_away(
    gateway_settings: Settings, fake_engine: FakeEngine
) -> None:
    ours = (read_manifest(gateway_settings.bank).fingerprint,)
    engine, router = FakeEngine(Knobs(banks=ours)).start(), FakeEngine().start()  # it has all that a router is asked
    urls = {"engine_url": router.url, "engine_urls": f"{gateway_settings.engine_url}, {engine.url}/"}
    with GatewayThread(gateway_settings.model_copy(update=urls)) as gateway, gateway.client() as client:
        becomes(client, 200, "ok", "ok")
        for is_gone in (False, True):
            wait_until(lambda: parts_of(client)[0] is None, "the gateway to see the router")
            if is_gone:
                router.stop()
            else:
                router.knobs.status = 500
            wait_until(
                lambda: "the gateway calls engines directly" in str(parts_of(client)[0]), "the gateway to see it"
            )
            assert parts_of(client)[1]["engine_url"]["status"] == "unavailable"
            becomes(client, 200, "ok", "ok")
            router.reset()
        engine.stop()
        becomes(client, 200, "ok", "unavailable")
        fake_engine.knobs.banks = ("cd" * 32,)
        try:
            becomes(client, 503, "other_bank", "unavailable")
        finally:
            fake_engine.knobs.banks = ours
        engine.start()
        becomes(client, 200, "ok", "ok")
    engine.stop()


def test_an_engine_with_another_key_is_not_ready(gateway_settings: Settings, fake_engine: FakeEngine) -> None:
    settings = gateway_settings.model_copy(update={"engine_key": None})
    with GatewayThread(settings) as gateway, gateway.client() as client:
        becomes(client, 503, "wrong_key")
        assert client.get("/ready").json()["parts"]["engine_url"]["status"] == "wrong_key"


def test_whoever_asks_whether_the_gateway_is_ready_has_no_part_asked(
    client: httpx.Client, fake_engine: FakeEngine
) -> None:
    wait_until_ready(client)
    before = fake_engine.looks
    for _ in range(100):
        client.get("/ready").raise_for_status()
    assert fake_engine.looks - before < 50  # it is looked at in the background, a few times a second


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


def test_what_was_seen_too_long_ago_counts_for_nothing(
    gateway_settings: Settings, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.gateway.operating.health.STALE_AFTER_S", 1.0)
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
            assert "probe" in response.json()["detail"]
            assert client.get("/health").status_code == 200
        let_go.set()
        wait_until_ready(client)  # a fault in one round does not end the watch
