"""What limits count on Redis."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import redis.asyncio as redis

from server.errors import Unavailable
from server.gateway.access.running import Running
from server.store.redis.access.rates import RedisRates
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.rates import Rate
from tests.support.store_parts import StoreParts

_numbers = itertools.count()


@pytest.fixture
def rates(parts: StoreParts) -> RedisRates:
    return RedisRates(parts.connection)


@pytest.fixture
def rate() -> Rate:
    return Rate("requests", f"owner-{next(_numbers)}", 5)


class TestRates:
    """Sliding windows."""

    async def test_no_more_is_taken_than_there_is(self, rates: RedisRates, rate: Rate) -> None:
        taken = await asyncio.gather(*(rates.take(rate, 1) for _ in range(9)))
        assert sum(taken) == 5
        left = await rates.left(rate)
        assert left.amount == 0
        assert 0 < left.more_in_s <= 60

    async def test_all_or_nothing(self, rates: RedisRates, rate: Rate) -> None:
        assert await rates.take(rate, 3)
        assert not await rates.take(rate, 3)
        assert await rates.take(rate, 2)

    async def test_what_is_given_back_can_be_taken_again(self, rates: RedisRates, rate: Rate) -> None:
        assert await rates.take(rate, 5)
        assert await rates.take(rate, -4)
        assert (await rates.left(rate)).amount == 4
        assert await rates.take(rate, 4)

    async def test_owners_do_not_share(self, rates: RedisRates, rate: Rate) -> None:
        other = Rate(rate.what, rate.owner + "x", rate.most)
        assert await rates.take(rate, 5)
        assert (await rates.left(other)) == await rates.left(Rate("tokens", rate.owner, 5))
        assert (await rates.left(other)).amount == 5

    async def test_use_is_forgotten(self, rates: RedisRates) -> None:
        rate = Rate("requests", f"owner-{next(_numbers)}", 1, 1)
        assert await rates.take(rate, 1)
        async with asyncio.timeout(30):
            while not await rates.take(rate, 1):
                await asyncio.sleep(0.1)

    async def test_nothing_stays(self, rates: RedisRates, rate: Rate, raw: redis.Redis) -> None:
        await rates.take(rate, 1)
        await rates.hold("x", ["a"], 30)
        assert all([await raw.pttl(key) > 0 for key in await raw.keys("*")])


class TestLeases:
    """Who holds what."""

    async def test_only_so_many_hold_it(self, rates: RedisRates) -> None:
        assert await rates.hold("x", ["a"], 30, 2) == 1
        assert await rates.hold("x", ["b"], 30, 2) == 2
        assert await rates.hold("x", ["c"], 30, 2) is None
        assert await rates.hold("x", ["a"], 30, 2) == 2  # renewed
        await rates.let_go("x", "a")
        assert await rates.hold("x", ["c"], 30, 2) == 2
        assert await rates.hold("y", ["c"], 30, 2) == 1

    async def test_a_lease_ends(self, rates: RedisRates) -> None:
        await rates.hold("x", ["a"], 0.05, 1)
        await asyncio.sleep(0.1)
        assert await rates.hold("x", ["b"], 30, 1) == 1

    async def test_any_number_can_be_counted(self, rates: RedisRates) -> None:
        assert await rates.hold("gateways", ["a", "b", "c"], 30) == 3


class TestSeats:
    """Requests in progress, as a gateway keeps them."""

    async def test_renewing_does_not_bring_back_who_left_meanwhile(
        self, rates: RedisRates, parts: StoreParts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running = Running(rates)
        seat, reached, gate, run = (
            await running.enter("key-x", 1),
            asyncio.Event(),
            asyncio.Event(),
            parts.connection.run,
        )

        async def late(*arguments: Any) -> Any:
            reached.set()
            await gate.wait()
            return await run(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(parts.connection, "run", late)
            renewing = asyncio.create_task(running.renew())
            await reached.wait()
        await running.leave(seat)
        gate.set()
        await renewing
        assert (await running.enter("key-x", 1)).free

    async def test_a_seat_whose_answer_was_lost_is_left_with_its_request(
        self, rates: RedisRates, parts: StoreParts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running, run = Running(rates), parts.connection.run

        async def lost(*arguments: Any) -> Any:
            await run(*arguments)
            raise Unavailable("lost on its way from the store")

        with monkeypatch.context() as patched:
            patched.setattr(parts.connection, "run", lost)
            seat = await running.enter("key-x", 1)
        assert seat.free
        assert not (await running.enter("key-x", 1)).free
        await running.leave(seat)
        assert (await running.enter("key-x", 1)).free

    async def test_who_goes_on_keeps_its_seat(self, rates: RedisRates, raw: redis.Redis) -> None:
        running = Running(rates)
        await running.enter("key-x", 1)
        await raw.pexpire("mta:held:running/key-x", 50_000)
        await running.renew()
        assert await raw.pttl("mta:held:running/key-x") > 50_000
        assert not (await running.enter("key-x", 1)).free


async def test_a_store_that_is_away_is_said_to_be(rate: Rate) -> None:
    connection = RedisConnection("redis://127.0.0.1:1", require_durable=False)
    rates = RedisRates(connection)
    for asked in (rates.take(rate, 1), rates.left(rate), rates.hold("x", ["a"], 1), rates.let_go("x", "a")):
        with pytest.raises(Unavailable):
            await asked
    await connection.close()
