"""A gateway before two engines and a real router: which engine answers, and what happens when one is gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import httpx
import pytest

from bank.manifest import read_manifest
from bench.rig.processes import children, command_line, descendants, mta, running, wait_until
from bench.rig.tiny import world
from server.settings import Settings
from server.supervisor.services import ROUTER_OPTIONS, free_port
from tests.support.calls import adapt
from tests.support.fake_engine import KEY, FakeEngine, Knobs, Seen
from tests.support.gateway import becomes, chunks_of, generate, serving
from tests.support.router import Router, running_router

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child")
ALONE = shutil.which("unshare") and not subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode
PEOPLE, USER = 12, "routed-0"
BREAKER_S = float(str(ROUTER_OPTIONS["cb-timeout-duration-secs"]))


@dataclass(frozen=True, slots=True)
class Fleet:
    engines: tuple[FakeEngine, FakeEngine]
    router: Router
    client: httpx.Client  # of the gateway
    recipes: dict[str, str]  # by person

    @property
    def seen(self) -> list[Seen]:
        return [seen for engine in self.engines for seen in engine.seen]

    def check_each_recipe_has_one_engine(self) -> None:
        for user in [*self.recipes] * 2:
            generate(self.client, user).raise_for_status()
        one, other = ({seen.body["model"] for seen in engine.seen} for engine in self.engines)
        assert one | other == set(self.recipes.values())
        assert one and other and not one & other


@pytest.fixture(scope="module")
def started(gateway_settings: Settings) -> Iterator[Fleet]:
    banks = (read_manifest(gateway_settings.bank_folder()).fingerprint,)
    engines = FakeEngine(Knobs(banks)).start(), FakeEngine(Knobs(banks)).start()
    with running_router([engine.url for engine in engines]) as router:
        urls = {"engine_url": router.url, "engine_urls": ",".join(engine.url for engine in engines)}
        with serving(gateway_settings, **urls) as client:
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
    fleet.check_each_recipe_has_one_engine()


def test_request_and_its_trace_reach_the_engine_unchanged(fleet: Fleet) -> None:
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


def test_unanswered_request_is_resent_under_another_session(fleet: Fleet) -> None:
    generate(fleet.client, USER).raise_for_status()
    (serving,) = (engine for engine in fleet.engines if engine.seen)
    serving.seen.clear()
    serving.knobs.dies = 1
    answer = generate(fleet.client, USER, stream=True)
    assert answer.is_success and chunks_of(answer)[-1] == "[DONE]"
    recipe = fleet.recipes[USER]
    assert sorted(seen.headers["x-session-id"] for seen in fleet.seen) == [recipe, f"{recipe}~"]


def test_the_router_tells_nobody_whose_requests_pass(fleet: Fleet) -> None:
    generate(fleet.client, USER).raise_for_status()
    for engine in fleet.engines:
        engine.turn(status=500)
    assert generate(fleet.client, USER).status_code == 503
    for engine in fleet.engines:
        engine.reset()
    wait_until(lambda: generate(fleet.client, USER).is_success, "the breakers to close")
    assert "mta3:" not in fleet.router.process.output
    assert "mta3:" not in httpx.get(fleet.router.metrics_url).text


@pytest.mark.parametrize("place", [0, 1])
def test_other_engine_answers_and_counts_while_one_is_down(fleet: Fleet, place: int) -> None:
    down, up = fleet.engines[place], fleet.engines[1 - place]
    down.stop()
    try:
        for _ in range(4):
            adapt(fleet.client, USER).raise_for_status()
        for stream in (False, True):
            for user in fleet.recipes:
                assert generate(fleet.client, user, stream=stream).is_success
        assert {seen.body["model"] for seen in up.seen} == set(fleet.recipes.values())
        said = becomes(fleet.client, 200, *(("unavailable", "ok") if place == 0 else ("ok", "unavailable")))
        assert (said["status"], said["detail"]) == ("ready", "1 of 2 engines cannot be used, the others serve")
    finally:
        down.start()
    assert becomes(fleet.client, 200, "ok", "ok")["detail"] is None
    asked = partial(generate, fleet.client)
    wait_until(lambda: all(asked(user).is_success for user in fleet.recipes) and bool(down.seen), "it to be back")


def test_returned_engine_serves_before_the_router_trusts_it(fleet: Fleet) -> None:
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
    becomes(fleet.client, 200, "ok", "ok")


@pytest.mark.parametrize(
    ("knobs", "status", "times"),
    [({"dies": 10}, 502, 2), ({"status": 400}, 400, 1), ({"status": 422}, 400, 1), ({"die_after": 2}, 200, 1)],
    ids=["never a third time", "refused once", "refused once as well", "not after the first token"],
)
def test_a_second_failure_or_a_refusal_is_final(fleet: Fleet, knobs: dict[str, int], status: int, times: int) -> None:
    for engine in fleet.engines:
        engine.turn(**knobs)
    answer = generate(fleet.client, USER, stream=True)
    assert answer.status_code == status
    assert status != 200 or chunks_of(answer)[-1]["error"]["code"] == "engine_failed"
    assert len(fleet.seen) == times


def test_without_the_router_engines_are_asked_directly(fleet: Fleet) -> None:
    os.kill(fleet.router.process.process.pid, signal.SIGKILL)  # in the last test: it does not come back
    fleet.check_each_recipe_has_one_engine()


@pytest.mark.skipif(not ALONE, reason="this user may not begin a namespace of processes (`unshare --pid`)")
def test_router_as_process_1_stops_while_awaiting_an_engine() -> None:
    waiting = mta("router", "--engine-urls", "http://127.0.0.1:1", "--port", str(free_port()))
    with running([*UNSHARE, *waiting], {"MTA_METRICS_PORT": str(free_port())}) as process:
        wait_until(lambda: any("vllm_router" in command_line(pid) for pid in descendants(process.process.pid)), "it")
        (first,) = children(process.process.pid)
        os.kill(first, signal.SIGTERM)
        process.wait()
