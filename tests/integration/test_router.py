"""A gateway before two engines and a real router: which engine answers, and what happens when one is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from bank.manifest import read_manifest
from bench.fleet.ring import Ring
from bench.rig.processes import wait_until
from bench.rig.router import Router, running_router
from bench.rig.tiny import world
from server.settings import Settings
from server.supervisor.router import OPTIONS
from tests.support.fake_engine import KEY, FakeEngine, Knobs, Seen
from tests.support.gateway import GatewayThread, chunks_of, generate, wait_until_ready

PEOPLE = 12
BREAKER_S = float(str(OPTIONS["cb-timeout-duration-secs"]))


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a test looks at.

    Attributes:
        engines: two of them.
        router: in front of both.
        client: of the gateway.
        recipes: each person's.
    """

    engines: tuple[FakeEngine, FakeEngine]
    router: Router
    client: httpx.Client
    recipes: dict[str, str]

    @property
    def seen(self) -> list[Seen]:
        """What reached the engines, in no order across them."""
        return [seen for engine in self.engines for seen in engine.seen]

    def becomes(self, *statuses: str) -> dict[str, Any]:
        """Wait until the gateway knows the engines to be so; returns what it says of itself."""

        def said() -> dict[str, Any]:
            answer: dict[str, Any] = self.client.get("/ready").json()
            return answer

        wait_until(lambda: tuple(one["status"] for one in said()["parts"]["engines"]) == statuses, f"{statuses}")
        return said()


@pytest.fixture(scope="module")
def started(gateway_settings: Settings) -> Iterator[Fleet]:
    banks = (read_manifest(gateway_settings.bank_folder()).fingerprint,)
    engines = FakeEngine(Knobs(banks)).start(), FakeEngine(Knobs(banks)).start()
    with running_router([engine.url for engine in engines]) as router:
        urls = {"engine_url": router.url, "engine_urls": ",".join(engine.url for engine in engines)}
        with GatewayThread(gateway_settings.model_copy(update=urls)) as gateway, gateway.client() as client:
            wait_until_ready(client)
            recipes = {}
            for number in range(PEOPLE):
                items = [{"text": world(number % 6)}, {"text": f"{world(number % 6)}, {world(number * 5 % 7)}"}]
                user = f"routed-{number}"
                recipes[user] = client.put(f"/users/{user}/profile", json={"items": items}).json()["recipe"]
            yield Fleet(engines, router, client, recipes)
    for engine in engines:
        engine.stop()


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """Both engines there, at rest, nothing seen."""
    for engine in started.engines:
        engine.reset()
    return started


def test_a_recipe_is_always_served_by_the_same_engine(fleet: Fleet) -> None:
    for user in [*fleet.recipes] * 3:
        generate(fleet.client, user).raise_for_status()
    served = [{seen.body["model"] for seen in engine.seen} for engine in fleet.engines]
    assert served[0] | served[1] == set(fleet.recipes.values())
    assert not served[0] & served[1]
    assert all(served)


def test_it_is_the_engine_that_a_simulated_fleet_would_choose(fleet: Fleet) -> None:
    ring = Ring([engine.url for engine in fleet.engines])
    with httpx.Client(base_url=fleet.router.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        for number in range(100):
            session = f"mta3:0123abcd:cat:a03*{number + 1}+a17*{999 - number}"
            body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": session}).raise_for_status()
    chosen = [{seen.headers["x-session-id"] for seen in engine.seen} for engine in fleet.engines]
    assert sum(map(len, chosen)) == 100
    for number, sessions in enumerate(chosen):
        assert {ring.engine_of(session) for session in sessions} == {number}


def test_a_request_reaches_the_engine_as_it_was_sent(fleet: Fleet) -> None:
    user, recipe = next(iter(fleet.recipes.items()))
    asked = {"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "seed": 2**40 + 1, "stop": ["."]}
    generate(fleet.client, user, **asked).raise_for_status()
    (seen,) = fleet.seen
    assert {name: seen.body[name] for name in asked} == asked
    assert seen.body["cache_salt"]
    assert seen.headers["x-session-id"] == seen.body["model"] == recipe


def test_a_trace_goes_on_behind_the_router(fleet: Fleet) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {KEY}", "X-Session-ID": "base", "traceparent": traceparent}
    httpx.post(f"{fleet.router.url}/v1/chat/completions", json=body, headers=headers).raise_for_status()
    assert fleet.seen[0].headers["traceparent"] == traceparent


def test_the_router_tells_nobody_whose_requests_pass(fleet: Fleet) -> None:
    generate(fleet.client, next(iter(fleet.recipes))).raise_for_status()
    for engine in fleet.engines:
        engine.knobs.status = 500
    assert generate(fleet.client, next(iter(fleet.recipes))).status_code == 503
    for engine in fleet.engines:
        engine.knobs.status = None
    wait_until(lambda: generate(fleet.client, next(iter(fleet.recipes))).is_success, "the breakers to close")
    assert "mta3:" not in fleet.router.process.output
    assert "mta3:" not in httpx.get(fleet.router.metrics_url).text


def test_while_one_engine_is_down_every_request_is_answered_by_the_other(fleet: Fleet) -> None:
    down, up = fleet.engines
    down.stop()
    try:
        for stream in (False, True):
            for user in fleet.recipes:
                assert generate(fleet.client, user, stream=stream).is_success
        assert {seen.body["model"] for seen in up.seen} == set(fleet.recipes.values())
        said = fleet.becomes("unavailable", "ok")
        assert (said["status"], said["detail"]) == ("ready", "1 of 2 engines cannot be used, and the others serve")
    finally:
        down.start()
    assert fleet.becomes("ok", "ok")["detail"] is None
    wait_until(lambda: all(generate(fleet.client, user) for user in fleet.recipes) and bool(down.seen), "it to be back")


def test_an_engine_that_is_back_serves_before_the_router_trusts_it_again(fleet: Fleet) -> None:
    """One goes just after the other has come back: the router knows nobody, and engines are asked directly."""
    first, second = fleet.engines
    first.stop()
    until_s = time.monotonic() + BREAKER_S + 0.5
    while time.monotonic() < until_s:  # until the router has tried it again, and found it still gone
        for user in fleet.recipes:
            generate(fleet.client, user).raise_for_status()
    first.start()
    second.stop()
    try:
        for stream in (False, True):
            for user in fleet.recipes:
                answer = generate(fleet.client, user, stream=stream)
                assert answer.is_success, answer.text
    finally:
        second.start()
    fleet.becomes("ok", "ok")


def test_a_request_of_which_nothing_came_is_sent_once_more_under_another_session(fleet: Fleet) -> None:
    user, recipe = next(iter(fleet.recipes.items()))
    generate(fleet.client, user).raise_for_status()
    (serving,) = (engine for engine in fleet.engines if engine.seen)
    serving.seen.clear()
    serving.knobs.dies = 1
    answer = generate(fleet.client, user, stream=True)
    assert answer.is_success and chunks_of(answer)[-1] == "[DONE]"
    assert sorted(seen.headers["x-session-id"] for seen in fleet.seen) == [recipe, f"{recipe}~"]


def test_a_request_is_not_sent_a_third_time(fleet: Fleet) -> None:
    for engine in fleet.engines:
        engine.knobs.dies = 10
    assert generate(fleet.client, next(iter(fleet.recipes)), stream=True).status_code == 502
    assert len(fleet.seen) == 2


def test_after_its_first_token_an_answer_is_never_begun_again(fleet: Fleet) -> None:
    for engine in fleet.engines:
        engine.knobs.die_after = 2
    *_, last = chunks_of(generate(fleet.client, next(iter(fleet.recipes)), stream=True))
    assert last["error"]["code"] == "engine_failed"
    assert len(fleet.seen) == 1


@pytest.mark.parametrize("status", [400, 422])
def test_what_the_engine_refuses_is_refused_once(fleet: Fleet, status: int) -> None:
    for engine in fleet.engines:
        engine.knobs.status = status
    assert generate(fleet.client, next(iter(fleet.recipes))).status_code == 400
    assert len(fleet.seen) == 1


def test_tokens_are_counted_while_the_first_engine_is_down(fleet: Fleet) -> None:
    for engine in fleet.engines:
        engine.stop()
        try:
            for _ in range(4):
                sample = {"input": "What is it like?", "output": "Salty."}
                answer = fleet.client.post("/users/routed-0/adapt", json={"samples": [sample] * 4})
                assert answer.status_code == 202, answer.text
        finally:
            engine.start()
    fleet.becomes("ok", "ok")


def test_without_the_router_engines_are_asked_directly(fleet: Fleet) -> None:
    """The last test: the router does not come back."""
    os.kill(fleet.router.process.process.pid, signal.SIGKILL)
    for user in [*fleet.recipes] * 2:
        assert generate(fleet.client, user).is_success
    served = [{seen.body["model"] for seen in engine.seen} for engine in fleet.engines]
    assert not served[0] & served[1]
    assert all(served)
