"""Limits of keys and users: requests and tokens a minute, requests at once, adapt jobs a day; others cost nothing.

A key's own limits are checked before a request's body is read, in a round trip to the store; what only the body tells,
the user and the tokens, is counted while the profile is read.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from server.errors import TooMany, Unavailable
from server.gateway.access.keys import Caller
from server.settings import Settings
from server.store.tenants.rates import DAY_S, MINUTE_S, Allowance, BucketLevel, Rate, Rates, Use
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

RENEW_S = 15.0
_LEASE_S = 60.0  # requests of a gateway that died count for so long
_BUSY_S = 1.0
_USER = "user-"
_SHOWN = ("requests", "tokens")


@dataclass(slots=True)
class RequestUsage:
    """What a request uses of its limits, until the end of its answer: made by `Limiter`."""

    caller: Caller
    allowance: Allowance
    tokens: int | None = 0  # how many it used; None if nobody can say, and the estimate counts
    uses: list[Use] = field(default_factory=list)  # what has been counted, and may be given back
    levels: dict[Rate, BucketLevel] = field(default_factory=dict)  # of all rates that apply, as they were last seen
    member: str = ""  # its name among the key's requests in progress; empty where they are not counted
    body: asyncio.Task[None] | None = None  # counts what the body told

    async def within_limits(self) -> None:
        """Return once what the body told is known to be within all limits."""
        if self.body:
            await asyncio.shield(self.body)  # what it uses must be known, even if the client leaves now

    def headers(self) -> dict[str, str]:
        """OpenAI's headers that say what is left, of the key's limit or the user's, whichever is nearer."""
        headers = {}
        for level in sorted(self.levels.values(), key=lambda level: -level.left):
            if (what := level.rate.what) in _SHOWN:
                headers[f"x-ratelimit-limit-{what}"] = str(level.rate.most)
                headers[f"x-ratelimit-remaining-{what}"] = str(level.left)
                headers[f"x-ratelimit-reset-{what}"] = f"{level.fits_in_s(level.rate.most):.3f}s"
        return headers


def usage_of(request: Mapping[str, Any]) -> RequestUsage:
    """The usage that the gates (`routes.py`) began, given as Starlette's `Request` or as an ASGI scope."""
    usage: RequestUsage = request["state"]["usage"]
    return usage


class InProgress:
    """Each caller's requests in progress, over all gateways."""

    def __init__(self, store: Rates) -> None:
        self._store = store
        self._members: defaultdict[str, set[str]] = defaultdict(set)

    async def enter(self, caller: str, most: int) -> str | None:
        """A name for `leave`, or None if there are so many already; while the store is away there may be any number."""
        member = secrets.token_hex(8)
        self._members[caller].add(member)
        try:
            if await self._store.acquire(f"running/{caller}", [member], _LEASE_S, most) is None:
                self._members[caller].discard(member)
                return None
        except Unavailable as error:  # it may be counted all the same: its answer was lost
            log.warning("a request in progress is not counted: %s", error.explained)
        return member

    async def leave(self, caller: str, member: str) -> None:
        self._members[caller].discard(member)
        try:
            await self._store.release(f"running/{caller}", member)
        except Unavailable as error:
            log.warning("a request in progress counts for another %g s: %s", _LEASE_S, error.explained)

    async def renew(self) -> None:
        """Go on counting what is still in progress; to be called every `RENEW_S`."""
        for caller, members in list(self._members.items()):
            if members:
                await self._store.renew(f"running/{caller}", sorted(members), _LEASE_S)


class Limiter:
    """Counts requests of keys and users, for all gateways together.

    The limits of keys in `settings` are for those without limits of their own; a tenant without keys counts as one key.
    `refused` is called with the reason of each refusal.
    """

    def __init__(self, store: Rates, settings: Settings, refused: Callable[[str], None]) -> None:
        self.in_progress = InProgress(store)
        self._store = store
        self._per_key = Allowance(
            settings.key_requests, settings.key_tokens, settings.key_jobs, settings.key_concurrent
        )
        self._per_user = Allowance(settings.user_requests, settings.user_tokens, settings.user_jobs)
        self._refused = refused
        self._working: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)  # by caller

    @asynccontextmanager
    async def counted(
        self, caller: Caller, user_key: str | None = None, *, generates: bool = False
    ) -> AsyncIterator[RequestUsage]:
        """Count one request, for the duration of a `with` block; one that `generates` needs a token left."""
        allowance = caller.allowance.with_defaults(self._per_key)
        usage, most = RequestUsage(caller, allowance), allowance.concurrent or 0
        uses = _uses(caller.name, allowance, {"requests": 1, "tokens": 0} if generates else {"requests": 1})
        uses += self._of_user(user_key, {"requests": 1})
        try:
            if most and (settling := self._working[caller.name]):  # who has an answer may ask again at once
                await asyncio.wait(settling)
            if uses or most:
                await self._use(usage, uses, most)
            yield usage
        finally:
            if uses or most or usage.body:
                self._later(caller, self._settle(usage))

    def count_body(self, usage: RequestUsage, user: User | None, tokens: Callable[[], int]) -> None:
        """Count what only a generation's body tells; `RequestUsage.within_limits` says whether it fits.

        `tokens` estimates how many it needs; in the end `usage.tokens` counts instead.
        """
        amounts = {"tokens": tokens()} if usage.allowance.tokens or (user and self._per_user.tokens) else {}
        uses = _uses(usage.caller.name, usage.allowance, amounts)
        uses += self._of_user(user.key if user else None, {"requests": 1} | amounts)
        if uses:
            usage.body = asyncio.create_task(self._use(usage, uses, 0))

    def count_afterwards(self, caller: Caller) -> None:
        """Count a request that is never refused, for which nobody waits, against its key."""
        if uses := _uses(caller.name, caller.allowance.with_defaults(self._per_key), {"requests": 1}):
            self._later(caller, self._correct(uses))

    async def take_job(self, caller: Caller, user_key: str) -> Sequence[Use]:
        """Count an adapt job; returns what `refund` takes if there is no new job after all."""
        usage, jobs = RequestUsage(caller, caller.allowance.with_defaults(self._per_key)), {"jobs": 1}
        if uses := _uses(caller.name, usage.allowance, jobs) + self._of_user(user_key, jobs):
            await self._use(usage, uses, 0)
        return usage.uses

    async def refund(self, uses: Sequence[Use]) -> None:
        await self._correct([replace(use, amount=-use.amount) for use in uses])

    def _of_user(self, user_key: str | None, amounts: Mapping[str, int]) -> list[Use]:
        return [] if user_key is None else _uses(f"{_USER}{user_key}", self._per_user, amounts)

    async def _use(self, usage: RequestUsage, uses: Sequence[Use], most: int) -> None:
        """Use all of it, or raise and use nothing: a user who asks too often uses up nothing of their app's.

        `usage` gets what the store counted. `most` requests of the caller may be in progress, 0 for any number.
        """
        tried = asyncio.gather(*(self._try(owned, usage) for owned in _by_owner(uses)))
        is_full = False
        if most:  # not where the body is counted, which must not forget the place that the request has
            unfit, member = await asyncio.gather(tried, self.in_progress.enter(usage.caller.name, most))
            usage.member, is_full = member or "", member is None
        else:
            unfit = await tried
        refused = [use for owned in unfit for use in owned]
        if not is_full and not refused:
            return
        given, usage.uses = usage.uses, []
        await self.refund(given)
        raise self._refusal(refused, most, usage)

    async def _try(self, uses: Sequence[Use], usage: RequestUsage) -> Sequence[Use]:
        """Use some of an owner's rates, and return those that do not fit; where 0 is used, 1 has to be left."""
        try:
            found = await self._store.consume(uses)
        except Unavailable as error:
            log.warning("a request is not counted: %s", error.explained)
            return ()
        usage.levels.update({level.rate: level for level in found.levels})
        if found.counted:
            usage.uses += uses
        known = zip(uses, found.fit, found.levels, strict=True)
        return [use for use, fits, level in known if not fits or level.left < (not use.amount)]

    async def _settle(self, usage: RequestUsage) -> None:
        """Count the tokens that were really used, and give the place back."""
        if usage.body:
            await asyncio.gather(usage.body, return_exceptions=True)
        if usage.tokens is not None:
            estimates = [use for use in usage.uses if use.rate.what == "tokens" and use.amount]
            await self._correct([replace(use, amount=usage.tokens - use.amount) for use in estimates])
        if usage.member:
            await self.in_progress.leave(usage.caller.name, usage.member)

    async def _correct(self, uses: Sequence[Use]) -> None:
        changed = [use for use in uses if use.amount]
        try:
            await asyncio.gather(*map(self._store.correct, _by_owner(changed)))
        except Unavailable as error:
            log.warning("what a request used could not be settled: %s", error.explained)

    def _refusal(self, unfit: Sequence[Use], most: int, usage: RequestUsage) -> TooMany:
        self._refused(unfit[0].rate.what if unfit else "concurrent")
        if unfit:
            rate, wait_s = unfit[0].rate, max(usage.levels[use.rate].fits_in_s(use.amount or 1) for use in unfit)
            what = "adapt jobs a day" if rate.what == "jobs" else f"{rate.what} a minute"
            whose = "user" if rate.owner.startswith(_USER) else "API key"
            reason = f"this {whose} may use {rate.most} {what}, and fewer are left than this request needs"
            message = f"{reason}: try again in {wait_s:.0f} s"
        else:
            wait_s = _BUSY_S
            message = f"{most} requests of this API key are in progress, the most at once: try again in a moment"
        return TooMany(message, retry_after_s=wait_s, limits=usage.headers())

    def _later(self, caller: Caller, work: Coroutine[Any, Any, None]) -> None:
        """Do work that nobody waits for but the caller's next request."""
        task = asyncio.create_task(work)
        working = self._working[caller.name]
        working.add(task)
        task.add_done_callback(working.discard)


def _uses(owner: str, allowance: Allowance, amounts: Mapping[str, int]) -> list[Use]:
    """An owner's limited uses; an estimate above the limit would be refused for ever, and counts as all of it."""
    return [
        Use(Rate(what, owner, most, DAY_S if what == "jobs" else MINUTE_S), min(amount, most))
        for what, amount in amounts.items()
        if (most := getattr(allowance, what))
    ]


def _by_owner(uses: Iterable[Use]) -> Iterable[list[Use]]:
    """What goes to the store at once: an owner's rates lie together, there and in `uses`."""
    return [list(owned) for _, owned in groupby(uses, key=lambda use: use.rate.owner)]
