"""How much each key and each user may ask for: requests and tokens a minute, requests at once, adapt jobs a day.

What is not limited is not counted, and costs nothing. What is costs one round trip to the store, beside the one that
reads the profile: only the headers need a second one, while the engine is at work.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from server.errors import TooMany, Unavailable
from server.gateway.access.caller import Caller
from server.gateway.operating.metrics import Metrics
from server.store.tenants.rates import DAY_S, MINUTE_S, Left, Rate, Rates

log = logging.getLogger("mta.gateway")

LEASE_S = 60.0
RENEW_S = 15.0
"""A gateway that dies takes its requests' places with it for `LEASE_S`; one that lives renews them in time."""

_BUSY_S = 1.0
_USER = "user-"
_SHOWN = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one key, or one user, may use; 0 for any amount.

    Attributes:
        requests, tokens: within a minute.
        jobs: adapt jobs within a day.
        concurrent: requests at once.
    """

    requests: int = 0
    tokens: int = 0
    jobs: int = 0
    concurrent: int = 0


@dataclass(frozen=True, slots=True)
class _Use:
    """Some of what a rate allows."""

    rate: Rate
    amount: int


class Counted:
    """A request that is counted: made by `Limiter`.

    Attributes:
        tokens: how many it used; None if nobody can say, and the estimate counts.
    """

    def __init__(self) -> None:
        self.tokens: int | None = 0
        self.allowed: asyncio.Task[Sequence[_Use]] | None = None
        self.shown: asyncio.Task[dict[str, str]] | None = None

    async def let_in(self) -> None:
        """Return once it is known to be within all limits.

        Raises:
            TooMany: when it is not.
        """
        if self.allowed:
            await asyncio.shield(self.allowed)  # what it uses must be known, even if the client leaves now

    async def headers(self) -> Mapping[str, str]:
        """OpenAI's headers that say what is left; empty where nothing is limited."""
        return await self.shown if self.shown else {}


class Limiter:
    """Counts requests of keys and users, for all gateways together.

    Args:
        store: where they are counted.
        per_key: what each key may use; all who need none are one.
        per_user: what each user may use.
        metrics: counts who is refused.
    """

    def __init__(self, store: Rates, *, per_key: Allowance, per_user: Allowance, metrics: Metrics) -> None:
        self._store = store
        self._per_key = per_key
        self._per_user = per_user
        self._metrics = metrics
        self._counts_tokens = per_key.tokens > 0 or per_user.tokens > 0
        self._held: defaultdict[str, set[str]] = defaultdict(set)
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
        uses = self._uses(caller, user_key, requests=1, tokens=tokens() if self._counts_tokens else 0)
        busy = f"running/{caller.name}" if self._per_key.concurrent else ""
        if not uses and not busy:
            yield counted
            return
        member = secrets.token_hex(8)
        counted.allowed = asyncio.create_task(self._take(uses, busy, member, counted))
        try:
            yield counted
        finally:
            self._later(self._settle(counted, busy, member))

    async def take_job(self, caller: Caller, user_key: str) -> Sequence[_Use]:
        """Count an adapt job.

        Returns:
            What `give_back` takes if there is no new job after all.

        Raises:
            TooMany: when there have been as many as allowed.
        """
        return await self._take(self._uses(caller, user_key, jobs=1), "", "", Counted())

    async def give_back(self, uses: Sequence[_Use]) -> None:
        """Count some uses no more."""
        for use in uses:
            await self._quietly(self._store.take(use.rate, -use.amount))

    async def renew(self) -> None:
        """Keep the places of requests in progress; to be called every `RENEW_S`."""
        for name, members in list(self._held.items()):
            await self._store.hold(name, sorted(members), LEASE_S)

    def _uses(self, caller: Caller, user_key: str | None, **amounts: int) -> list[_Use]:
        owners = [(caller.name, self._per_key)]
        if user_key is not None:
            owners.append((f"{_USER}{user_key}", self._per_user))
        uses = []
        for owner, allowance in owners:
            for what, amount in amounts.items():
                if amount and (most := getattr(allowance, what)):
                    window_s = DAY_S if what == "jobs" else MINUTE_S
                    # An estimate above the limit would be refused for ever.
                    uses.append(_Use(Rate(what, owner, most, window_s), min(amount, most)))
        return uses

    async def _take(self, uses: Sequence[_Use], busy: str, member: str, counted: Counted) -> Sequence[_Use]:
        """Use all of it, or raise and use nothing: a user who asks too often uses up nothing of their app's.

        Returns:
            What is counted: not what the store could not count.
        """
        *fits, there = await asyncio.gather(*map(self._fits, uses), self._enter(busy, member))
        taken = [use for use, fit in zip(uses, fits, strict=True) if fit]
        counted.shown = asyncio.create_task(self._headers(uses))
        if there and False not in fits:
            return taken
        await asyncio.gather(self.give_back(taken), self._leave(busy, member))
        raise await self._refusal([use for use, fit in zip(uses, fits, strict=True) if fit is False], counted)

    async def _fits(self, use: _Use) -> bool | None:
        """Whether it is within the limit, and counted; None where the store cannot say."""
        try:
            return await self._store.take(use.rate, use.amount)
        except Unavailable as error:
            log.warning("a request is not counted: %s", error.explained)
            return None

    async def _enter(self, busy: str, member: str) -> bool:
        """Whether there is room for one more request in progress."""
        try:
            if busy and await self._store.hold(busy, [member], LEASE_S, self._per_key.concurrent) is None:
                return False
        except Unavailable as error:
            log.warning("a request is not counted: %s", error.explained)
        else:
            self._held[busy].add(member)
        return True

    async def _leave(self, busy: str, member: str) -> None:
        if busy and member in self._held[busy]:
            self._held[busy].discard(member)
            await self._quietly(self._store.let_go(busy, member))
        if not self._held[busy]:
            del self._held[busy]

    async def _settle(self, counted: Counted, busy: str, member: str) -> None:
        """Count the tokens that were really used, and the request as in progress no more."""
        assert counted.allowed
        try:
            taken = await counted.allowed
        except TooMany:
            return
        for use in taken:
            if use.rate.what == "tokens" and counted.tokens is not None:
                await self._quietly(self._store.take(use.rate, min(counted.tokens, use.rate.most) - use.amount))
        await self._leave(busy, member)

    async def _refusal(self, unfit: Sequence[_Use], counted: Counted) -> TooMany:
        self._metrics.shed.labels(unfit[0].rate.what if unfit else "concurrent").inc()
        headers = await counted.headers()
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
            f"{self._per_key.concurrent} requests of this API key are in progress, the most at once: try again in a "
            "moment",
            retry_after_s=_BUSY_S,
            limits=headers,
        )

    async def _headers(self, uses: Sequence[_Use]) -> dict[str, str]:
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

    async def _wait_s(self, use: _Use) -> float:
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
