"""`/health`, `/ready`, `/metrics`, and a gateway whose store is away."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bank.manifest import read_manifest
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready

NewUser = Callable[[], str]


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


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that starts in this test looks at its parts more often, so that nobody waits for it."""
    monkeypatch.setattr("server.gateway.operating.health.PROBE_INTERVAL_S", 0.2)


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

    def test_one_with_another_bank_is_named_and_the_other_serves(self, ready: Readiness, engine: FakeEngine) -> None:
        engine.knobs.banks = ("ab" * 32,)
        assert "abababab" in ready.becomes(200, first="ok", second="other_bank")[1]["detail"]

    def test_one_with_two_banks_one_of_them_ours_is_well(self, ready: Readiness, engine: FakeEngine) -> None:
        engine.knobs.banks = ("ab" * 32, *engine.knobs.banks)
        wait_until(lambda: len(ready.ask()[1]["parts"]["engines"][1]["banks"]) == 2, "the gateway to see both")
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
            patch.setattr(gateway.parts.health, "_ask_store", hang)
            wait_until(lambda: client.get("/ready").json()["status"] == "stale", "the state to be too old")
            response = client.get("/ready")
            assert response.status_code == 503
            assert "watch" in response.json()["detail"]
            assert client.get("/health").status_code == 200
        let_go.set()
        wait_until_ready(client)  # a fault in one round does not end the watch


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

    def test_each_stage_has_its_histogram(self, client: httpx.Client, new_user: NewUser) -> None:
        user_id = new_user()
        client.put(f"/users/{user_id}/profile", json={"items": [{"text": "x"}]}).raise_for_status()
        request = {"user_id": user_id, "prompt": "x", "max_tokens": 1, "stream": True}
        client.post("/generate", json=request).raise_for_status()
        for stage in ("profile", "recipe", "engine_ttft", "engine", "total"):
            assert value(client, f'mta_stage_seconds_count{{stage="{stage}"}}') > 0

    def test_first_tokens_are_timed_by_level_and_the_time_between_tokens(
        self, client: httpx.Client, new_user: NewUser
    ) -> None:
        first, between = 'mta_ttft_seconds_count{level="base"}', "mta_inter_token_seconds_count"
        before = value(client, first), value(client, between)
        request = {"user_id": new_user(), "prompt": "x", "max_tokens": 5, "stream": True}
        client.post("/generate", json=request).raise_for_status()
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
