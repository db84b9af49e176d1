"""What the fleet's benchmarks claim: each claim can fail; what a rolled fleet failed; what simulated fleets are."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from bench.fleet import rolling
from bench.fleet.chaos.asking import End, Outcome
from bench.fleet.chaos.census import Usage
from bench.fleet.chaos.faults import PARTS, Fault, Outage, shuffled
from bench.fleet.chaos.verdict import Claim, about_keys, about_outages, about_requests
from bench.fleet.simulate import served, zipf
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
def test_of_a_hundred_requests_while_an_engine_is_down_one_may_fail_and_none_without_a_reason(
    more: list[Outcome], wrong: str
) -> None:
    many = [asked(End.ANSWERED, 110.0)] * 100
    found = failing(about_requests([*many, *more], [ENGINE_AWAY, GATEWAY_AWAY]))
    assert len(found) == bool(wrong)
    assert all(claim.startswith(wrong) for claim in found)


def test_a_part_is_back_within_a_minute_takes_no_more_and_nothing_is_left_of_the_erased_but_tombstones() -> None:
    assert failing(about_outages([Outage(Fault("worker", 20.0), 0.0, 79.0)])) == []  # its pause does not count
    assert failing(about_outages([Outage(Fault("worker"), 0.0, 61.0)])) == ["worker"]
    later = [Usage(310, 90), Usage(320, 60), Usage(200, 99)]
    assert [Usage(200, 50).exceeded_by(usage) for usage in later] == [False, True, True]
    assert failing(about_keys(Counter({"epoch": 5, "mta:": 4}), users=5)) == []
    assert failing(about_keys(Counter({"epoch": 5, "profile": 20}), users=5)) != []
    faults = shuffled(random.Random(0), 3, 20.0)
    assert {(faults.count(Fault(part)), faults.count(Fault(part, 20.0))) for part in PARTS} == {(3, 1)}


def load(monkeypatch: pytest.MonkeyPatch, answers: Callable[[], httpx.Response]) -> rolling.Load:
    """Somebody who asks two gateways that answer so."""
    monkeypatch.setattr(rolling, "PAUSE_S", 0.001)
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: answers())
    asking = rolling.Load(["http://one", "http://other"], seed=0)
    asking.start()
    return asking


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (httpx.ReadTimeout("timed out"), True),
        (httpx.RemoteProtocolError("peer closed connection without sending complete message body"), True),
        (httpx.DecodingError("not gzip"), True),
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("timed out"), False),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), False),
    ],
)
def test_what_broke_has_failed_and_who_gets_no_connection_at_one_gateway_asks_the_other(
    error: Exception, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = itertools.cycle((True, False))

    def every_other() -> httpx.Response:
        if next(turns):
            raise error
        return ANSWER

    asking = load(monkeypatch, every_other)
    wait_until(lambda: asking.recipes.total() > 1 and len(asking.failures) >= 2 * failed, "two of each", 10)
    asking.stop()
    assert bool(asking.failures) is failed
    assert all(repr(error) in failure for failure in asking.failures)


def test_an_engine_keeps_the_recipes_that_were_used_last_and_users_ask_as_zipf_says() -> None:
    asking, engines = np.array([1, 2, 1, 3, 2, 1]), np.zeros(6, dtype=np.int64)
    assert served(asking, engines, 1, held=2).warm == pytest.approx(1 / 6)
    assert served(asking, engines, 1, held=3).warm == pytest.approx(3 / 6)
    assert served(asking, engines, 1, held=3, begin=3).warm == pytest.approx(2 / 3)
    assert served(asking, np.array([0, 1, 0, 1, 1, 0]), 2, held=2).warm == pytest.approx(3 / 6)
    counts = np.bincount(zipf(1000, 200_000, 1.0, np.random.default_rng(2)), minlength=1000)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)
    assert counts[0] / counts[99] == pytest.approx(100, rel=0.4)
