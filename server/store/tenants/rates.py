"""The store's port for limits: what is used of each within its window, and who holds what at this moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

MINUTE_S = 60
DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one key, or one user, may use: requests and tokens in a minute, adapt jobs in a day, requests at once.
    0 for any amount, None where nothing was said."""

    requests: int | None = None
    tokens: int | None = None
    jobs: int | None = None
    concurrent: int | None = None

    def or_else(self, usual: Allowance) -> Allowance:
        """What holds where nothing was said is as usual."""
        return replace(usual, **self.said) if self.said else usual

    @property
    def said(self) -> dict[str, int]:
        """What was said, by name."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


AS_USUAL = Allowance()


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit: within a window an owner, whose name shows no user id, may use `most` requests, tokens or jobs."""

    what: str
    owner: str
    most: int
    window_s: int = MINUTE_S


@dataclass(frozen=True, slots=True)
class Use:
    """Some of what a rate allows; below zero, some that is given back."""

    rate: Rate
    amount: int


@dataclass(frozen=True, slots=True)
class BucketLevel:
    """How much of a rate is used at a moment: 0 to `most`; it falls evenly, by all of `most` within the window."""

    rate: Rate
    used: float

    @property
    def left(self) -> int:
        """How much can be used now."""
        return int(self.rate.most - self.used)

    def fits_in_s(self, amount: int) -> float:
        """In how many seconds so much can be used."""
        return max(0.0, self.used + amount - self.rate.most) * self.rate.window_s / self.rate.most


@dataclass(frozen=True, slots=True)
class BucketLevels:
    """What came of some uses: which of them there was room for, and the level of each one's rate afterwards. They were
    counted if there was room for all."""

    fit: Sequence[bool]
    levels: Sequence[BucketLevel]

    @property
    def counted(self) -> bool:
        return all(self.fit)


class Rates(Protocol):
    """Counts for all gateways together. Every method raises `Unavailable` when the store cannot be reached.

    A rate is a bucket: what is used leaks out evenly, and whoever has used nothing for a window can use the whole
    limit at once, never more. What is counted may be lost with the server, unlike what users store.
    """

    async def consume(self, uses: Sequence[Use]) -> BucketLevels:
        """Use some of what an owner's rates allow: all of it, or nothing if there is too little left of one.

        All uses are of one owner, no rate twice. An amount of 0 only asks.
        """

    async def correct(self, uses: Sequence[Use]) -> None:
        """Count so much more or less of an owner's rates, whatever is left: no level leaves 0 to `most`."""

    async def acquire(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int | None:
        """Be among those who hold something, for `lease_s` or until `release`; calling it again renews that.

        Returns how many hold it now; None if there is no room for all of the members, whose names nobody else uses,
        among the `most` that may hold it.
        """

    async def renew(self, name: str, members: Sequence[str], lease_s: float) -> None:
        """Hold it for `lease_s` from now. A member that has been released, or never held it, stays without."""

    async def release(self, name: str, member: str) -> None:
        """Hold it no more."""
