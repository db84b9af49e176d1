"""Limits shared by all gateways: token buckets, and leases as sorted sets.

Writes do not wait for the disk, so a crash forgets the use of the last seconds. Limits also apply while the store is
full: their data is small and expires, and they restrain the caller who filled the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.errors import QuotaExceeded
from server.store.base import Store
from server.store.redis import keys
from server.store.redis.scripts import script

MINUTE_S = 60
DAY_S = 24 * 3600
MOST_DEBT = 10  # windows until an owner whose answers took more than estimated has everything again


@dataclass(frozen=True, slots=True)
class Allowance:
    """Limits of one key or one user; 0 means unlimited, None means not set."""

    requests: int | None = None  # per minute
    tokens: int | None = None  # per minute
    jobs: int | None = None  # adapt jobs per day
    concurrent: int | None = None

    def with_defaults(self, defaults: Allowance) -> Allowance:
        return replace(defaults, **self.overrides) if self.overrides else defaults

    @property
    def overrides(self) -> dict[str, int]:
        """The limits that are set, by name."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


NO_OVERRIDES = Allowance()


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit of `most` requests, tokens or jobs per window. The owner's name contains no user id."""

    what: str
    owner: str
    most: int
    window_s: int = MINUTE_S


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may hold (`holdings.py`) and use; None: as much as it likes."""

    people: int | None = None
    bytes: int | None = None
    adapters: int | None = None
    tokens: int | None = None  # a day, prompt and answer, over all keys

    @property
    def limits(self) -> dict[str, int]:
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}

    def daily_tokens(self, tenant: str) -> Rate | None:
        return Rate("tokens", f"quota-{tenant}", self.tokens, DAY_S) if self.tokens is not None else None


def quota_exceeded(tenant: str, what: str, used: float, most: int, more: int) -> QuotaExceeded:
    """Return the error of a request that needs `more` than is left; `what` is a field of `Quota`."""
    unit, option = ("tokens a day", "tokens-per-day") if what == "tokens" else (what, what)
    remedy = "tokens come back evenly over a day" if what == "tokens" else "erase users to make room"
    return QuotaExceeded(
        f"the tenant {tenant} has used {used:,.0f} of its quota of {most:,} {unit}, and this request needs {more:,} "
        f"more: {remedy}, or let an operator raise it (`mta keys quota {tenant} --{option} N`)"
    )


@dataclass(frozen=True, slots=True)
class Use:
    """An amount used of a rate; negative to give some back."""

    rate: Rate
    amount: int


@dataclass(frozen=True, slots=True)
class BucketLevel:
    """Amount used of a rate, more than `most` if answers took more than estimated. It falls by `most` per window."""

    rate: Rate
    used: float
    fits: bool  # whether the use that asked for it fitted

    @property
    def left(self) -> int:
        return max(0, int(self.rate.most - self.used))

    def fits_in_s(self, amount: int) -> float:
        """Return the seconds until an amount is available."""
        return max(0.0, self.used + amount - self.rate.most) * self.rate.window_s / self.rate.most


_CONSUME = script("rates/consume", runs_when_full=True)
_ACQUIRE = script("rates/acquire", runs_when_full=True)
_RENEW = script("rates/renew", runs_when_full=True)


class Rates(Store):
    """Leaky buckets and leases."""

    async def consume(self, uses: Sequence[Use], *, anyway: bool = False) -> list[BucketLevel]:
        """Count all uses, or none if one does not fit, and return the level of each one's rate afterwards.

        All are for one owner and different rates; 0 only queries. `anyway` counts also beyond a limit, as a debt.
        """
        names = [keys.rate(use.rate.owner, use.rate.what) for use in uses]
        given = [number for use in uses for number in (use.rate.most, use.rate.window_s * 1_000_000, use.amount)]
        levels = await self._connection.evaluate(_CONSUME, names, int(anyway), MOST_DEBT, *given)
        answers = zip(uses, levels[0::2], levels[1::2], strict=True)
        return [BucketLevel(use.rate, float(used), bool(fits)) for use, fits, used in answers]

    async def acquire(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int | None:
        """Add members to the holders of `name` for `lease_s` or until `release`, or renew them.

        Returns the number of holders, or None if not all members fit within `most`.
        """
        allowed, lease_ms = -1 if most is None else most, int(lease_s * 1000)
        count = await self._connection.evaluate(_ACQUIRE, (keys.held(name),), allowed, lease_ms, *members)
        return None if count < 0 else int(count)

    async def renew(self, name: str, members: Sequence[str], lease_s: float) -> None:
        """Extend members' leases to `lease_s` from now; members that are not holders are not added."""
        await self._connection.evaluate(_RENEW, (keys.held(name),), int(lease_s * 1000), *members)

    async def release(self, name: str, member: str) -> None:
        await self._connection.run(lambda redis: redis.zrem(keys.held(name), member))
