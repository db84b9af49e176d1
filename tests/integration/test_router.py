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
from bench.rig.processes import wait_until
from bench.rig.router import Router, running_router
from bench.rig.tiny import world
from server.settings import Settings
from server.supervisor.services import ROUTER_OPTIONS
from tests.support.fake_engine import KEY, FakeEngine, Knobs, Seen
from tests.support.gateway import GatewayThread, chunks_of, generate, wait_until_ready

PEOPLE, USER = 12, "routed-0"
BREAKER_S = float(str(ROUTER_OPTIONS["cb-timeout-duration-secs"]))


@dataclass(frozen=True, slots=True)
class Fleet:
    """A gateway, the router behind it, and two engines behind that."""

    engines: tuple[FakeEngine, FakeEngine]
    router: Router
    client: httpx.Client  # of the gateway
    recipes: dict[str, str]  # by person

    @property
    def seen(self) -> list[Seen]:
        """What reached the engines, in no order across them."""
        return [seen for engine in self.engines for seen in engine.seen]

    def turn(self, **knobs: int | None) -> None:
        """Turn knobs of both engines."""
        for engine in self.engines:
            for name, value in knobs.items():
                setattr(engine.knobs, name, value)

    def becomes(self, *statuses: str) -> dict[str, Any]:
        """Wait until the gateway knows the engines to be so; returns what it says of itself."""
        said: dict[str, Any] = {}

        def are() -> bool:
            said.update(self.client.get("/ready").json())
            return tuple(one["status"] for one in said["parts"]["engines"]) == statuses

        wait_until(are, f"{statuses}")
        return said


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


def test_a_request_and_its_trace_reach_the_engine_as_they_were_sent(fleet: Fleet) -> None:
    asked = {"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "seed": 2**40 + 1, "stop": ["."]}
    generate(fleet.client, USER, **asked).raise_for_status()
    (seen,) = fleet.seen
    assert {name: seen.body[name] for name in asked} == asked
    assert seen.body["cache_salt"]
    assert seen.headers["x-session-id"] == seen.body["model"] == fleet.recipes[USER]
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"Authorization": f"Bearer {KEY}", "X-Session-ID": "base", "traceparent": traceparent}
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    httpx.post(f"{fleet.router.url}/v1/chat/completions", json=body, headers=headers).raise_for_status()
    assert traceparent in [seen.headers.get("traceparent") for seen in fleet.seen]


def test_the_router_tells_nobody_whose_requests_pass(fleet: Fleet) -> None:
    generate(fleet.client, USER).raise_for_status()
    fleet.turn(status=500)
    assert generate(fleet.client, USER).status_code == 503
    fleet.turn(status=None)
    wait_until(lambda: generate(fleet.client, USER).is_success, "the breakers to close")
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
        assert (said["status"], said["detail"]) == ("ready", "1 of 2 engines cannot be used, the others serve")
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
    generate(fleet.client, USER).raise_for_status()
    (serving,) = (engine for engine in fleet.engines if engine.seen)
    serving.seen.clear()
    serving.knobs.dies = 1
    answer = generate(fleet.client, USER, stream=True)
    assert answer.is_success and chunks_of(answer)[-1] == "[DONE]"
    recipe = fleet.recipes[USER]
    assert sorted(seen.headers["x-session-id"] for seen in fleet.seen) == [recipe, f"{recipe}~"]


@pytest.mark.parametrize(
    ("knobs", "status", "times"),
    [({"dies": 10}, 502, 2), ({"status": 400}, 400, 1), ({"status": 422}, 400, 1)],
    ids=["never a third time", "refused once", "refused once as well"],
)
def test_what_fails_again_or_is_refused_is_not_sent_more_often(
    fleet: Fleet, knobs: dict[str, int], status: int, times: int
) -> None:
    fleet.turn(**knobs)
    assert generate(fleet.client, USER, stream=True).status_code == status
    assert len(fleet.seen) == times


def test_after_its_first_token_an_answer_is_never_begun_again(fleet: Fleet) -> None:
    fleet.turn(die_after=2)
    *_, last = chunks_of(generate(fleet.client, USER, stream=True))
    assert last["error"]["code"] == "engine_failed"
    assert len(fleet.seen) == 1


def test_tokens_are_counted_while_the_first_engine_is_down(fleet: Fleet) -> None:
    for engine in fleet.engines:
        engine.stop()
        try:
            for _ in range(4):
                sample = {"input": "What is it like?", "output": "Salty."}
                answer = fleet.client.post(f"/users/{USER}/adapt", json={"samples": [sample] * 4})
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
