"""What limits count on Redis."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from server.errors import Unavailable
from server.gateway.access.limiter import Limiter
from server.settings import Settings
from server.store.tenants import rates as scripts
from server.store.tenants.rates import Rate, Rates, Use
from tests.support.store_parts import StoreParts

Clock = Callable[[float], None]
_numbers = itertools.count()


@pytest.fixture
def rates(parts: StoreParts) -> Rates:
    return parts.rates


@pytest.fixture
def rate() -> Rate:
    return Rate("requests", f"owner-{next(_numbers)}", 5)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the time that the server's scripts see, in seconds."""
    script = scripts._CONSUME

    def set_to(now_s: float) -> None:
        time = f"{{{int(now_s)}, {int(now_s % 1 * 1e6)}}}"
        monkeypatch.setattr(scripts, "_CONSUME", script.replace("redis.call('TIME')", time))

    return set_to


def limiter(rates: Rates) -> Limiter:
    return Limiter(rates, Settings(), lambda reason: None)


async def take(rates: Rates, rate: Rate, amount: int) -> bool:
    return (await rates.consume([Use(rate, amount)])).counted


async def left(rates: Rates, rate: Rate) -> int:
    (level,) = (await rates.consume([Use(rate, 0)])).levels
    return level.left


async def test_no_more_is_taken_than_there_is_by_an_owner(rates: Rates, rate: Rate) -> None:
    assert sum(await asyncio.gather(*(take(rates, rate, 1) for _ in range(9)))) == 5
    assert await left(rates, replace(rate, most=20)) == 15  # another limit holds at once
    assert await left(rates, replace(rate, most=2)) == 0
    refused = await rates.consume([Use(rate, 1)])
    assert not refused.counted
    assert refused.levels[0].left == 0
    assert 0 < refused.levels[0].fits_in_s(1) <= 12
    for other in (replace(rate, owner=rate.owner + "x"), replace(rate, what="tokens")):
        assert await left(rates, other) == 5


async def test_of_several_rates_all_or_nothing(rates: Rates, rate: Rate) -> None:
    tokens = Rate("tokens", rate.owner, 100)
    assert (await rates.consume([Use(rate, 1), Use(tokens, 80)])).counted
    refused = await rates.consume([Use(rate, 1), Use(tokens, 80)])
    assert refused.fit == [True, False]
    assert [level.left for level in refused.levels] == [4, 20]
    assert [await left(rates, one) for one in (rate, tokens)] == [4, 20]


async def test_what_is_given_back_can_be_taken_again(rates: Rates, rate: Rate) -> None:
    assert await take(rates, rate, 5)
    await rates.correct([Use(rate, -4)])
    assert await left(rates, rate) == 4
    assert await take(rates, rate, 4)
    await rates.correct([Use(rate, 500)])  # more than the limit counts as all of it
    level = (await rates.consume([Use(rate, 1)])).levels[0]
    assert (level.left, level.fits_in_s(rate.most) <= rate.window_s) == (0, True)


async def test_a_refund_never_leaves_more_than_the_limit(rates: Rates, clock: Clock) -> None:
    rate = Rate("tokens", f"owner-{next(_numbers)}", 1000)
    for minute in range(12):  # an answer in each, which took a minute and a half, and none of its estimate
        clock(1000 + 120 * minute)
        assert await take(rates, rate, 600)
        clock(1000 + 120 * minute + 90)
        await rates.correct([Use(rate, -600)])
    assert await left(rates, rate) == 1000
    assert sum([await take(rates, rate, 100) for _ in range(100)]) == 10


async def test_use_leaks_evenly_within_a_window(rates: Rates, rate: Rate, clock: Clock) -> None:
    clock(1000)
    assert await take(rates, rate, 5)
    clock(1011)
    assert not await take(rates, rate, 1)
    clock(1012)
    assert await take(rates, rate, 1)
    assert not await take(rates, rate, 1)
    clock(100_000)
    assert await left(rates, rate) == 5
    assert not await take(rates, rate, 6)
    assert await take(rates, rate, 5)
    clock(1000)  # it was set back
    assert not await take(rates, rate, 1)
    clock(1012)
    assert await take(rates, rate, 1)


async def test_nothing_stays(rates: Rates, rate: Rate, raw: Redis) -> None:
    await take(rates, rate, 1)
    await rates.acquire("x", ["a"], 30)
    assert all([0 < await raw.pttl(key) <= 30_000 for key in await raw.keys("*")])
    await rates.correct([Use(rate, -1)])
    assert not await raw.keys("mta:rates:*")


async def test_only_so_many_hold_it_until_their_leases_end(rates: Rates) -> None:
    assert await rates.acquire("x", ["a"], 30, 2) == 1
    assert await rates.acquire("x", ["b"], 30, 2) == 2
    assert await rates.acquire("x", ["c"], 30, 2) is None
    assert await rates.acquire("x", ["a"], 30, 2) == 2  # renewed
    await rates.release("x", "a")
    assert await rates.acquire("x", ["c"], 30, 2) == 2
    assert await rates.acquire("y", ["c"], 0.05, 1) == 1
    assert await rates.acquire("gateways", ["a", "b", "c"], 30) == 3
    await asyncio.sleep(0.1)
    assert await rates.acquire("y", ["d"], 30, 1) == 1


async def test_renewing_does_not_bring_back_who_left(parts: StoreParts, monkeypatch: pytest.MonkeyPatch) -> None:
    running, reached, gate, run = limiter(parts.rates), asyncio.Event(), asyncio.Event(), parts.connection.run
    member = await running._enter("key-x", 1)

    async def late(*arguments: Any) -> Any:
        reached.set()
        await gate.wait()
        return await run(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(parts.connection, "run", late)
        renewing = asyncio.create_task(running.renew_concurrent())
        await reached.wait()
    assert member
    await running._leave("key-x", member)
    gate.set()
    await renewing
    member = await running._enter("key-x", 1)
    assert member
    await running._leave("key-x", member)

    async def sent(*arguments: Any) -> Any:
        raise AssertionError(arguments)

    monkeypatch.setattr(parts.connection, "run", sent)
    await running.renew_concurrent()


async def test_a_seat_whose_answer_was_lost_is_left(parts: StoreParts, monkeypatch: pytest.MonkeyPatch) -> None:
    running, run = limiter(parts.rates), parts.connection.run

    async def lost(*arguments: Any) -> Any:
        await run(*arguments)
        raise Unavailable("lost on its way from the store")

    with monkeypatch.context() as patched:
        patched.setattr(parts.connection, "run", lost)
        member = await running._enter("key-x", 1)
    assert member
    assert not await running._enter("key-x", 1)
    await running._leave("key-x", member)
    assert await running._enter("key-x", 1)


async def test_who_goes_on_keeps_its_seat(rates: Rates, raw: Redis) -> None:
    running = limiter(rates)
    await running._enter("key-x", 1)
    await raw.pexpire("mta:held:running/key-x", 50_000)
    await running.renew_concurrent()
    assert await raw.pttl("mta:held:running/key-x") > 50_000
    assert not await running._enter("key-x", 1)
