"""Rate limits per key and user: requests and tokens a minute, concurrent requests, adapt jobs a day.

A key's limits are checked before the body is read, in one round trip to the store. Limits that depend on the body (the
user's, and tokens) are counted while the profile is read. Unlimited rates cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeVar

from server.errors import QuotaExceeded, TooMany, Unavailable
from server.gateway.access.keys import Caller, KnownKeys
from server.settings import Settings
from server.store.jobs import Job
from server.store.tenants.rates import DAY_S, MINUTE_S, Allowance, BucketLevel, Quota, Rate, Rates, Use, quota_exceeded
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

RENEW_INTERVAL_S = 15.0
_LEASE_S = 60.0  # seconds until the requests of a crashed gateway stop counting
_USER = "user-"

MadeJob = TypeVar("MadeJob", bound="Job | None")


@dataclass(slots=True)
class RequestUsage:
    """What a request consumes of its limits, until its response ends; created by `Limiter`."""

    caller: Caller
    allowance: Allowance
    tokens: int | None = 0  # tokens used; None if unknown, in which case the estimate stands
    uses: list[Use] = field(default_factory=list)  # counted uses, which can be refunded
    levels: dict[Rate, BucketLevel] = field(default_factory=dict)  # last known level of each rate that applies
    member: str = ""  # name among the key's concurrent requests; empty if those are unlimited
    body: asyncio.Task[None] | None = None  # counts the limits that depend on the body

    async def within_limits(self) -> None:
        """Wait until the limits that depend on the body are checked; raise `TooMany` or `QuotaExceeded` if one is."""
        if self.body:
            await asyncio.shield(self.body)  # finish counting even if the client disconnects

    def headers(self) -> dict[str, str]:
        """Return OpenAI's rate limit headers; if key and user both have a limit, show the one with less left."""
        headers = {}
        for level in sorted(self.levels.values(), key=lambda level: -level.left):
            if (what := level.rate.what) in ("requests", "tokens"):
                headers[f"x-ratelimit-limit-{what}"] = str(level.rate.most)
                headers[f"x-ratelimit-remaining-{what}"] = str(level.left)
                headers[f"x-ratelimit-reset-{what}"] = f"{level.fits_in_s(level.rate.most):.3f}s"
        return headers


def usage_of(request: Mapping[str, Any]) -> RequestUsage:
    """Return the usage created by the gates (`routes.py`), given Starlette's `Request` or an ASGI scope."""
    usage: RequestUsage = request["state"]["usage"]
    return usage


class Limiter:
    """Enforces the limits of keys and users across all gateways; `refused` is called with the reason of each refusal.

    The key limits in `settings` apply to keys without limits of their own. A tenant without keys counts as one key.
    """

    def __init__(self, store: Rates, keys: KnownKeys, settings: Settings, refused: Callable[[str], None]) -> None:
        self._store = store
        self._keys = keys
        self._per_key = Allowance(
            settings.key_requests, settings.key_tokens, settings.key_jobs, settings.key_concurrent
        )
        self._per_user = Allowance(settings.user_requests, settings.user_tokens, settings.user_jobs)
        self._refused = refused
        self._members: defaultdict[str, set[str]] = defaultdict(set)  # concurrent requests, by caller
        self._settling: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)  # by caller

    @asynccontextmanager
    async def counted(
        self, caller: Caller, user_key: str | None = None, *, generates: bool = False
    ) -> AsyncIterator[RequestUsage]:
        """Count one request for the duration of a `with` block; a request that `generates` needs a token left."""
        allowance = caller.policy.allowance.with_defaults(self._per_key)
        usage, limit = RequestUsage(caller, allowance), allowance.concurrent or 0
        uses = _uses(caller.owner, allowance, {"requests": 1, "tokens": 0} if generates else {"requests": 1})
        uses += self._of_user(user_key, {"requests": 1})
        try:
            if limit and (settling := self._settling[caller.owner]):  # a client may send again right after a response
                await asyncio.wait(settling)
            if uses or limit:
                await self._consume(usage, uses, limit)
            yield usage
        finally:
            if uses or limit or usage.body:
                settled = asyncio.create_task(self._settle(usage))
                self._settling[caller.owner].add(settled)
                settled.add_done_callback(self._settling[caller.owner].discard)

    def count_body(self, usage: RequestUsage, user: User | None, tokens: Callable[[], int]) -> None:
        """Start counting what depends on a generation's body; `usage.tokens` replaces the estimated `tokens` later."""
        daily = self._daily(usage.caller)
        counts_tokens = daily or usage.allowance.tokens or (user and self._per_user.tokens)
        amounts = {"tokens": tokens()} if counts_tokens else {}
        uses = _uses(usage.caller.owner, usage.allowance, amounts)
        uses += self._of_user(user.key if user else None, {"requests": 1} | amounts)
        uses += [Use(daily, min(amounts["tokens"], daily.most))] if daily else []
        if uses:
            usage.body = asyncio.create_task(self._consume(usage, uses, 0))

    async def take(self, caller: Caller, what: str, user_key: str | None = None) -> Sequence[Use]:
        """Count one of `what`, a field of `Allowance`."""
        usage = RequestUsage(caller, caller.policy.allowance.with_defaults(self._per_key))
        if uses := _uses(caller.owner, usage.allowance, {what: 1}) + self._of_user(user_key, {what: 1}):
            await self._consume(usage, uses, 0)
        return usage.uses

    async def take_job(self, caller: Caller, user_key: str, submit: Callable[[], Awaitable[MadeJob]]) -> MadeJob:
        """Submit an adapt job; count it if it is new."""
        uses = await self.take(caller, "jobs", user_key)
        try:
            job = await submit()
        except Exception:  # not if the client has left: the job may be there
            await self._refund(uses)
            raise
        if job is None or not job.is_new:  # refused, or a repeated request
            await self._refund(uses)
        return job

    async def _refund(self, uses: Sequence[Use]) -> None:
        await self._correct([replace(use, amount=-use.amount) for use in uses])

    async def renew_concurrent(self) -> None:
        """Renew the leases of this gateway's concurrent requests; call this every `RENEW_INTERVAL_S`."""
        for caller, members in list(self._members.items()):
            if members:
                await self._store.renew(f"running/{caller}", sorted(members), _LEASE_S)

    async def _enter(self, caller: str, limit: int) -> str | None:
        """Return a name for `_leave`, or None if `limit` are in progress; there is no limit while the store is down."""
        member = secrets.token_hex(8)
        self._members[caller].add(member)
        try:
            if await self._store.acquire(f"running/{caller}", [member], _LEASE_S, limit) is None:
                self._members[caller].discard(member)
                return None
        except Unavailable as error:  # the store may have counted the request: only its reply was lost
            log.warning("a concurrent request may not be counted: %s", error.explained)
        return member

    async def _leave(self, caller: str, member: str) -> None:
        self._members[caller].discard(member)
        try:
            await self._store.release(f"running/{caller}", member)
        except Unavailable as error:
            log.warning("a finished request counts as concurrent for another %g s: %s", _LEASE_S, error.explained)

    def _daily(self, caller: Caller) -> Rate | None:
        return self._keys.quotas.get(caller.tenant, Quota()).daily_tokens(caller.tenant)

    def _of_user(self, user_key: str | None, amounts: Mapping[str, int]) -> list[Use]:
        return [] if user_key is None else _uses(f"{_USER}{user_key}", self._per_user, amounts)

    async def _consume(self, usage: RequestUsage, uses: Sequence[Use], limit: int) -> None:
        """Consume all `uses`, or none and raise: a user over their limit must not use up the limit of their app's key.

        Record in `usage` what the store counted. `limit` is the caller's maximum of concurrent requests, 0 for none.
        """
        tried = asyncio.gather(*(self._try_consume(owned, usage) for owned in _by_owner(uses)))
        is_full = False
        if limit:  # 0 when the body is counted: `usage.member` must keep the request's name then
            unfit, member = await asyncio.gather(tried, self._enter(usage.caller.owner, limit))
            usage.member, is_full = member or "", member is None
        else:
            unfit = await tried
        refused = [use for owned in unfit for use in owned]
        if not is_full and not refused:
            return
        consumed, usage.uses = usage.uses, []
        await self._refund(consumed)
        raise self._refusal(refused, limit, usage)

    async def _try_consume(self, uses: Sequence[Use], usage: RequestUsage) -> Sequence[Use]:
        """Consume from one owner's rates and return the uses that do not fit; a use of 0 needs at least 1 left."""
        try:
            levels = await self._store.consume(uses)
        except Unavailable as error:
            log.warning("a request may not be counted against its limits: %s", error.explained)
            return ()
        usage.levels.update({level.rate: level for level in levels})
        if all(level.fits for level in levels):
            usage.uses += uses
        known = zip(uses, levels, strict=True)
        return [use for use, level in known if not level.fits or level.left < (not use.amount)]

    async def _settle(self, usage: RequestUsage) -> None:
        """Replace the token estimate by the tokens used, and leave the concurrent requests."""
        if usage.body:
            await asyncio.gather(usage.body, return_exceptions=True)
        if usage.tokens is not None:
            estimates = [use for use in usage.uses if use.rate.what == "tokens" and use.amount]
            await self._correct([replace(use, amount=usage.tokens - use.amount) for use in estimates])
        if usage.member:
            await self._leave(usage.caller.owner, usage.member)

    async def _correct(self, uses: Sequence[Use]) -> None:
        changed = [use for use in uses if use.amount]
        try:
            await asyncio.gather(*(self._store.consume(owned, anyway=True) for owned in _by_owner(changed)))
        except Unavailable as error:
            log.warning("the usage of a request could not be corrected: %s", error.explained)

    def _refusal(self, unfit: Sequence[Use], limit: int, usage: RequestUsage) -> TooMany | QuotaExceeded:
        caller = usage.caller
        if exceeded := next((use for use in unfit if use.rate == self._daily(caller)), None):
            self._refused("quota")
            used, most = usage.levels[exceeded.rate].used, exceeded.rate.most
            return quota_exceeded(caller.tenant, "tokens", used, most, exceeded.amount)
        self._refused(unfit[0].rate.what if unfit else "concurrent")
        if unfit:
            rate, wait_s = unfit[0].rate, max(usage.levels[use.rate].fits_in_s(use.amount or 1) for use in unfit)
            what = "adapt jobs a day" if rate.what == "jobs" else f"{rate.what} a minute"
            whose = "user" if rate.owner.startswith(_USER) else "API key"
            reason = f"the limit of this {whose} is {rate.most} {what}, and less is left than this request needs"
            message = f"{reason}: try again in {wait_s:.0f} s"
        else:
            wait_s = 1.0
            message = f"this API key is at its limit of concurrent requests, {limit}: try again in a moment"
        return TooMany(message, retry_after_s=wait_s, limits=usage.headers())


def _uses(owner: str, allowance: Allowance, amounts: Mapping[str, int]) -> list[Use]:
    """Return the uses of an owner's limited rates; cap each at its limit, or a larger estimate could never fit."""
    return [
        Use(Rate(what, owner, limit, DAY_S if what == "jobs" else MINUTE_S), min(amount, limit))
        for what, amount in amounts.items()
        if (limit := getattr(allowance, what))
    ]


def _by_owner(uses: Iterable[Use]) -> Iterable[list[Use]]:
    """Group uses by owner, one call to the store each: in the store and in `uses`, an owner's rates are adjacent."""
    return [list(owned) for _, owned in groupby(uses, key=lambda use: use.rate.owner)]
