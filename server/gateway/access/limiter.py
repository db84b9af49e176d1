"""How much each key and each user may ask for: requests and tokens a minute, requests at once, adapt jobs a day.

What is not limited is not counted, and costs nothing. What is costs one round trip to the store, beside the one that
reads the profile: only the headers need a second one, while the engine is at work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from server.errors import TooMany, Unavailable
from server.gateway.access.caller import Caller
from server.gateway.access.counted import Counted, Taken, Use
from server.gateway.access.running import Running
from server.gateway.operating.metrics import Metrics
from server.store.tenants.rates import AS_USUAL, DAY_S, MINUTE_S, Allowance, Left, Rate, Rates

log = logging.getLogger("mta.gateway")

_BUSY_S = 1.0
_USER = "user-"
_SHOWN = ("requests", "tokens")


class Limiter:
    """Counts requests of keys and users, for all gateways together.

    Args:
        store: where they are counted.
        per_key: what each key may use for which nothing else was said; all who need none are one.
        per_user: what each user may use.
        metrics: counts who is refused.
    """

    def __init__(self, store: Rates, *, per_key: Allowance, per_user: Allowance, metrics: Metrics) -> None:
        self._store = store
        self._per_key = per_key
        self._per_user = per_user
        self._metrics = metrics
        self._running = Running(store)
        self._working: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def counted(
        self, caller: Caller, user_key: str | None, tokens: Callable[[], int] = lambda: 0
    ) -> AsyncIterator[Counted]:
        """Count one request, for the duration of a `with` block.

        Args:
            caller: whose key it carries.
            user_key: whom it is for; None for nobody in particular.
            tokens: says about how many it needs. What it really used, the block sets; the difference is given back.
        """
        counted = Counted()
        uses = self._uses(caller, user_key, {"requests": lambda: 1, "tokens": tokens})
        most = self._per(caller).concurrent
        if not uses and not most:
            yield counted
            return
        counted.allowed = asyncio.create_task(self._take(uses, caller.name, most or 0, counted))
        try:
            yield counted
        finally:
            self._later(self._settle(counted))

    async def take_job(self, caller: Caller, user_key: str) -> Sequence[Use]:
        """Count an adapt job.

        Returns:
            What `give_back` takes if there is no new job after all.

        Raises:
            TooMany: when there have been as many as allowed.
        """
        taken = await self._take(self._uses(caller, user_key, {"jobs": lambda: 1}), caller.name, 0, Counted())
        return taken.uses

    async def give_back(self, uses: Sequence[Use]) -> None:
        """Count some uses no more."""
        for use in uses:
            await self._quietly(self._store.take(use.rate, -use.amount))

    async def renew(self) -> None:
        """Keep counting the requests in progress; to be called every `RENEW_S`."""
        await self._running.renew()

    def _per(self, caller: Caller) -> Allowance:
        said = caller.allowance
        return self._per_key if said == AS_USUAL else said.or_else(self._per_key)

    def _uses(self, caller: Caller, user_key: str | None, amounts: Mapping[str, Callable[[], int]]) -> list[Use]:
        owners = [(caller.name, self._per(caller))]
        if user_key is not None:
            owners.append((f"{_USER}{user_key}", self._per_user))
        uses = []
        for owner, allowance in owners:
            for what, amount in amounts.items():
                if (most := getattr(allowance, what)) and (wanted := amount()):
                    window_s = DAY_S if what == "jobs" else MINUTE_S
                    # An estimate above the limit would be refused for ever.
                    uses.append(Use(Rate(what, owner, most, window_s), min(wanted, most)))
        return uses

    async def _take(self, uses: Sequence[Use], caller: str, most: int, counted: Counted) -> Taken:
        """Use all of it, or raise and use nothing: a user who asks too often uses up nothing of their app's.

        Args:
            uses: what is wanted.
            caller: who wants it.
            most: how many requests of the caller there may be in progress; 0 for any number.
            counted: gets the headers.

        Returns:
            What is counted: not what the store could not count.
        """
        fits, seat = await asyncio.gather(self._fit(uses), self._running.enter(caller, most))
        taken = Taken([use for use, fit in zip(uses, fits, strict=True) if fit], seat)
        counted.shown = asyncio.create_task(self._headers(uses))
        if seat.free and False not in fits:
            return taken
        await asyncio.gather(self.give_back(taken.uses), self._running.leave(seat))
        unfit = [use for use, fit in zip(uses, fits, strict=True) if fit is False]
        raise await self._refusal(unfit, most, await counted.headers())

    async def _fit(self, uses: Sequence[Use]) -> list[bool | None]:
        """Whether each is within its limit, and counted; None where the store cannot say."""
        return await asyncio.gather(*map(self._fits, uses))

    async def _fits(self, use: Use) -> bool | None:
        try:
            return await self._store.take(use.rate, use.amount)
        except Unavailable as error:
            log.warning("a request is not counted: %s", error.explained)
            return None

    async def _settle(self, counted: Counted) -> None:
        """Count the tokens that were really used, and the request as in progress no more."""
        assert counted.allowed
        try:
            taken = await counted.allowed
        except TooMany:
            return
        for use in taken.uses:
            if use.rate.what == "tokens" and counted.tokens is not None:
                await self._quietly(self._correct(use.rate, counted.tokens - use.amount))
        await self._running.leave(taken.seat)

    async def _correct(self, rate: Rate, more: int) -> None:
        """Count so much more, or less; what has been used beyond the limit counts as all that was left."""
        if more and not await self._store.take(rate, more):
            await self._store.take(rate, (await self._store.left(rate)).amount)

    async def _refusal(self, unfit: Sequence[Use], most: int, headers: Mapping[str, str]) -> TooMany:
        self._metrics.shed.labels(unfit[0].rate.what if unfit else "concurrent").inc()
        if unfit:
            rate, wait_s = unfit[0].rate, max([await self._wait_s(use) for use in unfit])
            what = "adapt jobs a day" if rate.what == "jobs" else f"{rate.what} a minute"
            whose = "user" if rate.owner.startswith(_USER) else "API key"
            return TooMany(
                f"this {whose} may use {rate.most} {what}, and fewer are left than this request needs: try again in "
                f"{wait_s:.0f} s",
                retry_after_s=wait_s,
                limits=headers,
            )
        return TooMany(
            f"{most} requests of this API key are in progress, the most at once: try again in a moment",
            retry_after_s=_BUSY_S,
            limits=headers,
        )

    async def _headers(self, uses: Sequence[Use]) -> dict[str, str]:
        """Of the key's limit and the user's the one that is nearer."""
        shown = [use.rate for use in uses if use.rate.what in _SHOWN]
        try:
            found = await asyncio.gather(*map(self._store.left, shown))
        except Unavailable:
            return {}
        headers = {}
        for rate, left in sorted(zip(shown, found, strict=True), key=lambda pair: -pair[1].amount):
            headers[f"x-ratelimit-limit-{rate.what}"] = str(rate.most)
            headers[f"x-ratelimit-remaining-{rate.what}"] = str(left.amount)
            headers[f"x-ratelimit-reset-{rate.what}"] = f"{_wait_s(rate, left, rate.most):.3f}s"
        return headers

    async def _wait_s(self, use: Use) -> float:
        """About how long it takes until a use fits."""
        try:
            return _wait_s(use.rate, await self._store.left(use.rate), use.amount)
        except Unavailable:
            return 1.0

    async def _quietly(self, work: Awaitable[object]) -> None:
        try:
            await work
        except Unavailable as error:
            log.warning("what a request used could not be settled: %s", error.explained)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what nobody waits for."""
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)


def _wait_s(rate: Rate, left: Left, amount: int) -> float:
    """About how long it takes until so much is left: after the first bit, use is forgotten at the rate's own pace."""
    lacking = amount - left.amount
    return left.more_in_s + (lacking - 1) * rate.window_s / rate.most if lacking > 0 else 0.0
