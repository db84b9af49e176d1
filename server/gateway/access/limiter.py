"""How much each key and each user may ask for: requests and tokens a minute, requests at once, adapt jobs a day.

What is not limited is not counted, and costs nothing. A key's own limits are looked at before a request's body is read,
which costs a round trip to the store. What only the body tells, the user and the tokens, is counted beside the one that
reads the profile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from server.errors import TooMany, Unavailable
from server.gateway.access.caller import Caller
from server.gateway.access.running import Running, Seat
from server.gateway.operating.metrics import Metrics
from server.store.tenants.rates import AS_USUAL, DAY_S, MINUTE_S, Allowance, BucketLevel, Rate, Rates, Use

log = logging.getLogger("mta.gateway")

_BUSY_S = 1.0
_USER = "user-"
_SHOWN = ("requests", "tokens")


class Counted:
    """A request that is counted, until the end of its answer: made by `Limiter`.

    Attributes:
        caller: whose it is.
        tokens: how many it used; None if nobody can say, and the estimate counts.
        uses: what it has been given, and may give back.
        levels: of all rates that it was held against, as they were last seen.
        seat: among the key's requests in progress.
    """

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.tokens: int | None = 0
        self.uses: list[Use] = []
        self.levels: dict[Rate, BucketLevel] = {}
        self.seat = Seat()
        self.body: asyncio.Task[None] | None = None

    async def let_in(self) -> None:
        """Return once what the body told is known to be within all limits.

        Raises:
            TooMany: when it is not.
        """
        if self.body:
            await asyncio.shield(self.body)  # what it uses must be known, even if the client leaves now

    def headers(self) -> dict[str, str]:
        """OpenAI's headers that say what is left, of the key's limit and the user's the one that is nearer."""
        shown = [level for level in self.levels.values() if level.rate.what in _SHOWN]
        headers = {}
        for level in sorted(shown, key=lambda level: -level.left):
            what = level.rate.what
            headers[f"x-ratelimit-limit-{what}"] = str(level.rate.most)
            headers[f"x-ratelimit-remaining-{what}"] = str(level.left)
            headers[f"x-ratelimit-reset-{what}"] = f"{level.fits_in_s(level.rate.most):.3f}s"
        return headers


def counted_of(request: Mapping[str, Any]) -> Counted:
    """A request as the way in (`routes.py`) counted it, given as Starlette's `Request` or as an ASGI scope."""
    counted: Counted = request["state"]["counted"]
    return counted


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
        self._working: dict[str, set[asyncio.Task[None]]] = {}  # by caller; none is empty

    @asynccontextmanager
    async def counted(
        self, caller: Caller, user_key: str | None = None, *, generates: bool = False
    ) -> AsyncIterator[Counted]:
        """Count one request, for the duration of a `with` block.

        Args:
            caller: whose key it carries.
            user_key: whom it is for, where that is known before its body.
            generates: whether it needs tokens: then there must be one left.

        Raises:
            TooMany: when it is not within the limits.
        """
        counted, most = Counted(caller), self._per(caller).concurrent or 0
        uses = self._of_key(caller, {"requests": 1} | ({"tokens": 0} if generates else {}))
        uses += self._of_user(user_key, {"requests": 1})
        try:
            if most and (settling := self._working.get(caller.name)):  # who has an answer may ask again at once
                await asyncio.wait(settling)
            if uses or most:
                await self._take(counted, uses, most)
            yield counted
        finally:
            if uses or most or counted.body:
                self._later(caller, self._settle(counted))

    def count_body(self, counted: Counted, user_key: str | None, tokens: Callable[[], int]) -> None:
        """Count what only a generation's body tells; `Counted.let_in` says whether it fits.

        Args:
            counted: the request.
            user_key: whom it is for; None for nobody in particular.
            tokens: says about how many it needs. What it really used, the block sets; the difference is given back.
        """
        needs = self._per(counted.caller).tokens or (user_key is not None and self._per_user.tokens)
        amounts = {"tokens": tokens()} if needs else {}
        uses = self._of_key(counted.caller, amounts) + self._of_user(user_key, {"requests": 1} | amounts)
        if uses:
            counted.body = asyncio.create_task(self._take(counted, uses, 0))

    def count_afterwards(self, caller: Caller) -> None:
        """Count a request that is never refused, for which nobody waits, against its key."""
        if uses := self._of_key(caller, {"requests": 1}):
            self._later(caller, self._correct(uses))

    async def take_job(self, caller: Caller, user_key: str) -> Sequence[Use]:
        """Count an adapt job.

        Returns:
            What `give_back` takes if there is no new job after all.

        Raises:
            TooMany: when there have been as many as allowed.
        """
        counted, uses = Counted(caller), self._of_key(caller, {"jobs": 1}) + self._of_user(user_key, {"jobs": 1})
        if uses:
            await self._take(counted, uses, 0)
        return counted.uses

    async def give_back(self, uses: Sequence[Use]) -> None:
        """Count some uses no more."""
        await self._correct([replace(use, amount=-use.amount) for use in uses])

    async def renew(self) -> None:
        """Keep counting the requests in progress; to be called every `RENEW_S`."""
        await self._running.renew()

    def _per(self, caller: Caller) -> Allowance:
        said = caller.allowance
        return self._per_key if said == AS_USUAL else said.or_else(self._per_key)

    def _of_key(self, caller: Caller, amounts: Mapping[str, int]) -> list[Use]:
        return _uses(caller.name, self._per(caller), amounts)

    def _of_user(self, user_key: str | None, amounts: Mapping[str, int]) -> list[Use]:
        return [] if user_key is None else _uses(f"{_USER}{user_key}", self._per_user, amounts)

    async def _take(self, counted: Counted, uses: Sequence[Use], most: int) -> None:
        """Use all of it, or raise and use nothing: a user who asks too often uses up nothing of their app's.

        Args:
            counted: gets what is counted: not what the store could not count.
            uses: what is wanted.
            most: how many requests of the caller there may be in progress; 0 for any number.
        """
        tried = asyncio.gather(*(self._try(owned, counted) for owned in _by_owner(uses)))
        unfit, seat = await asyncio.gather(tried, self._running.enter(counted.caller.name, most))
        refused = [use for owned in unfit for use in owned]
        if seat.member:
            counted.seat = seat
        if seat.free and not refused:
            return
        given, counted.uses = counted.uses, []
        await self.give_back(given)
        raise self._refusal(refused, most, counted)

    async def _try(self, uses: Sequence[Use], counted: Counted) -> Sequence[Use]:
        """Use some of an owner's rates, and return those that do not fit; where 0 is used, 1 has to be left."""
        try:
            found = await self._store.take(uses)
        except Unavailable as error:
            log.warning("a request is not counted: %s", error.explained)
            return ()
        counted.levels.update({level.rate: level for level in found.levels})
        if found.counted:
            counted.uses += uses
        known = zip(uses, found.fit, found.levels, strict=True)
        return [use for use, fits, level in known if not fits or level.left < (not use.amount)]

    async def _settle(self, counted: Counted) -> None:
        """Count the tokens that were really used, and the request as in progress no more."""
        if counted.body:
            await asyncio.gather(counted.body, return_exceptions=True)
        if counted.tokens is not None:
            taken = [use for use in counted.uses if use.rate.what == "tokens" and use.amount]
            await self._correct([replace(use, amount=counted.tokens - use.amount) for use in taken])
        await self._running.leave(counted.seat)

    async def _correct(self, uses: Sequence[Use]) -> None:
        """Count so much more or less of each rate."""
        changed = [use for use in uses if use.amount]
        await asyncio.gather(*(self._quietly(self._store.correct(owned)) for owned in _by_owner(changed)))

    def _refusal(self, unfit: Sequence[Use], most: int, counted: Counted) -> TooMany:
        self._metrics.shed.labels(unfit[0].rate.what if unfit else "concurrent").inc()
        if unfit:
            rate, wait_s = unfit[0].rate, max(counted.levels[use.rate].fits_in_s(use.amount or 1) for use in unfit)
            what = "adapt jobs a day" if rate.what == "jobs" else f"{rate.what} a minute"
            whose = "user" if rate.owner.startswith(_USER) else "API key"
            return TooMany(
                f"this {whose} may use {rate.most} {what}, and fewer are left than this request needs: try again in "
                f"{wait_s:.0f} s",
                retry_after_s=wait_s,
                limits=counted.headers(),
            )
        return TooMany(
            f"{most} requests of this API key are in progress, the most at once: try again in a moment",
            retry_after_s=_BUSY_S,
            limits=counted.headers(),
        )

    async def _quietly(self, work: Awaitable[object]) -> None:
        try:
            await work
        except Unavailable as error:
            log.warning("what a request used could not be settled: %s", error.explained)

    def _later(self, caller: Caller, work: Coroutine[Any, Any, None]) -> None:
        """Do what nobody waits for but the caller's next request."""
        task = asyncio.create_task(work)
        self._working.setdefault(caller.name, set()).add(task)
        task.add_done_callback(partial(self._done, caller.name))

    def _done(self, name: str, task: asyncio.Task[None]) -> None:
        self._working[name].discard(task)
        if not self._working[name]:
            del self._working[name]


def _uses(owner: str, allowance: Allowance, amounts: Mapping[str, int]) -> list[Use]:
    """Of what an owner's use is limited; an estimate above the limit would be refused for ever, and counts as all."""
    return [
        Use(Rate(what, owner, most, DAY_S if what == "jobs" else MINUTE_S), min(amount, most))
        for what, amount in amounts.items()
        if (most := getattr(allowance, what))
    ]


def _by_owner(uses: Iterable[Use]) -> Iterable[list[Use]]:
    """What goes to the store at once: an owner's rates lie together."""
    owned: dict[str, list[Use]] = {}
    for use in uses:
        owned.setdefault(use.rate.owner, []).append(use)
    return owned.values()
