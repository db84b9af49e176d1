"""What is claimed of fleets whose parts die: each claim can fail."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest

from bench.acceptance import PERSONAL
from bench.fleet.exercise import replacing
from bench.fleet.exercise.asking import End, Outcome
from bench.fleet.exercise.census import Usage
from bench.fleet.exercise.claims import Claim, about_keys, about_outages, about_requests
from bench.fleet.exercise.faults import Fault, Outage, shuffled
from bench.fleet.exercise.parts import KINDS
from bench.fleet.lasting import plan
from bench.fleet.replicas import Asked, Found
from bench.fleet.simulate import served, zipf
from bench.page.report import WRONG
from bench.rig.processes import wait_until

ENGINE_AWAY = Outage(Fault("engine"), 100.0, 120.0)
GATEWAY_AWAY = Outage(Fault("gateway"), 200.0, 205.0)
ANSWER = httpx.Response(200, text='{"recipe":"mta3:00000000:shared:c"}\n\ndata: [DONE]')


def asked(end: End, at_s: float, *, streaming: bool = False) -> Outcome:
    return Outcome("POST /generate", at_s, at_s + 1, end, "", streaming)


def failing(claims: list[Claim]) -> list[str]:
    return [claim.what for claim in claims if not claim.holds]


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ([asked(End.REFUSED, 110.0)] * 2, "failed before their first token"),
        ([asked(End.REFUSED, 110.0)], ""),
        ([asked(End.REFUSED, 300.0)] * 9, ""),
        ([asked(End.BROKEN, 110.0, streaming=True)] * 9, ""),
        ([asked(End.CUT, 199.5)], ""),
        ([asked(End.CUT, 206.0)], "connections lost while no gateway was down"),
        ([asked(End.UNCLEAR, 300.0)], "requests with neither answer nor clear error"),
    ],
)
def test_one_in_a_hundred_requests_may_fail_during_an_outage(more: list[Outcome], wrong: str) -> None:
    many = [asked(End.ANSWERED, 110.0)] * 100
    found = failing(about_requests([*many, *more], [ENGINE_AWAY, GATEWAY_AWAY]))
    assert len(found) == bool(wrong)
    assert all(claim.startswith(wrong) for claim in found)


def test_claims_on_outages_usage_and_leftover_keys_are_judged() -> None:
    assert failing(about_outages([Outage(Fault("worker", 20.0), 0.0, 79.0)])) == []  # its pause does not count
    assert failing(about_outages([Outage(Fault("worker"), 0.0, 61.0)])) == ["worker"]
    later = [Usage(310, 90), Usage(320, 60), Usage(200, 99)]
    assert [Usage(200, 50).exceeded_by(usage) for usage in later] == [False, True, True]
    assert failing(about_keys(Counter({"epoch": 5, "mta:": 4}), users=5)) == []
    assert failing(about_keys(Counter({"epoch": 5, "profile": 1}), users=5)) != []
    faults = shuffled(random.Random(0))
    assert {(faults.count(Fault(part)), faults.count(Fault(part, 20.0))) for part in KINDS} == {(3, 1)}


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (httpx.ReadTimeout("timed out"), True),
        (httpx.RemoteProtocolError("peer closed connection without sending complete message body"), True),
        (httpx.DecodingError("not gzip"), True),
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("timed out"), False),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), True),
    ],
)
def test_load_asks_other_gateway_only_when_no_connection_is_made(
    error: Exception, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacing, "PAUSE_S", 0.001)
    monkeypatch.setattr(httpx.Client, "request", MagicMock(side_effect=itertools.cycle((error, ANSWER))))
    asking = replacing.Load(["http://one", "http://other"], seed=0)
    asking.start()
    wait_until(lambda: asking.recipes.total() > 1 and len(asking.failures) >= 2 * failed, "two of each", 10)
    asking.stop()
    assert bool(asking.failures) is failed
    assert all(repr(error) in failure for failure in asking.failures)


def test_a_closed_gateway_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def request(client: httpx.Client, *_: object, **__: object) -> object:
        asked.append(str(client.base_url))
        return ANSWER

    monkeypatch.setattr(replacing, "PAUSE_S", 0.001)
    monkeypatch.setattr(httpx.Client, "request", request)
    asking = replacing.Load(["http://one", "http://other"], seed=0)
    asking.closed_url = "http://one"
    asking.start()
    wait_until(lambda: len(asked) > 10, "some requests", 10)
    asking.stop()
    assert set(asked) == {"http://other"}
    assert not asking.failures


@pytest.mark.parametrize(
    ("alone", "held", "wrong"),
    [
        ("mine", ({"r0"}, {"r1"}), []),
        ("another", ({"r0"}, {"r1"}), ["answers equal to one engine's"]),
        ("mine", ({"r0"}, set()), ["recipes"]),
        ("mine", ({"r0", "r1"}, {"r1"}), ["recipes on both engines"]),
    ],
)
def test_what_two_engines_do_otherwise_is_named(alone: str, held: tuple[set[str], set[str]], wrong: list[str]) -> None:
    asked = [Asked(f"r{n}", "signature", "?", "mine", "anybody's", "mine" if n else alone) for n in range(2)]
    rows = Found(asked, dict(zip(("engine-1", "engine-2"), held, strict=True))).rows
    assert [what for what, value in rows if WRONG in value] == wrong
    assert dict(rows)["answers unlike the base model's"] == "2 of 2"
    assert PERSONAL.met(dict(rows)["answers unlike the base model's"]) and not PERSONAL.met("8 of 10")


def test_engine_keeps_latest_recipes_and_users_ask_by_zipf() -> None:
    asking, engines = np.array([1, 2, 1, 3, 2, 1]), np.zeros(6, dtype=np.int64)
    assert served(asking, engines, 1, held=2).warm == pytest.approx(1 / 6)
    assert served(asking, engines, 1, held=3).warm == pytest.approx(3 / 6)
    assert served(asking, engines, 1, held=3, begin=3).warm == pytest.approx(2 / 3)
    assert served(asking, np.array([0, 1, 0, 1, 1, 0]), 2, held=2).warm == pytest.approx(3 / 6)
    counts = np.bincount(zipf(1000, 200_000, 1.0, np.random.default_rng(2)), minlength=1000)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)
    assert counts[0] / counts[99] == pytest.approx(100, rel=0.4)


def test_long_plan_has_deaths_hourly_backups_and_two_changes() -> None:
    lasting = MagicMock()
    events = list(plan(lasting, random.Random(1), 4 * 3600, 180, 3600))
    times = [at_s for at_s, _, _ in events]
    assert times == sorted(times) and times[-1] == 4 * 3600
    names = [what for _, what, _ in events]
    assert (names.count("backup"), names.count("next bank"), names.count("next secret")) == (4, 1, 1)
    assert names.index("next bank") < names.index("next secret")
    deaths = [name.removeprefix("death of ") for name in names if name.startswith("death of ")]
    assert 70 < len(deaths) < 90 and set(deaths) == set(KINDS)
    for _, _, event in events:
        event()
    assert [call.args[0] for call in lasting.die.call_args_list] == deaths
