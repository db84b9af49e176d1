"""The store's port for limits: what is used of each within its window, and who holds what at this moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

MINUTE_S = 60
DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one key, or one user, may use; 0 for any amount, None where nothing was said.

    Attributes:
        requests, tokens: within a minute.
        jobs: adapt jobs within a day.
        concurrent: requests at once.
    """

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
    """A limit on what somebody uses within a time.

    Attributes:
        what: is used: `requests`, `tokens` or `jobs`.
        owner: who uses it; shows no user id.
        most: how much may be used.
        window_s: within how long.
    """

    what: str
    owner: str
    most: int
    window_s: int = MINUTE_S


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a rate: how much can be used now, and after how many seconds there will be more."""

    amount: int
    more_in_s: float


class Rates(Protocol):
    """Counts for all gateways together. Every method raises `Unavailable` when the store cannot be reached.

    Windows slide: use is forgotten bit by bit. What is counted may be lost with the server, unlike what users store.
    """

    async def take(self, rate: Rate, amount: int) -> bool:
        """Use some of what a rate allows, if there is so much left; a negative amount gives it back.

        Returns:
            Whether it was there.
        """

    async def left(self, rate: Rate) -> Left:
        """What is left of a rate."""

    async def hold(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int | None:
        """Be among those who hold something, for some time or until `let_go`; calling it again renews that.

        Args:
            name: what is held.
            members: who, by names that nobody else uses.
            lease_s: for how long.
            most: how many may hold it; None for any number.

        Returns:
            How many hold it now; None if there is no room for all of the members.
        """

    async def renew(self, name: str, members: Sequence[str], lease_s: float) -> None:
        """Hold it for `lease_s` from now. A member that let go meanwhile, or was never among them, stays without."""

    async def let_go(self, name: str, member: str) -> None:
        """Hold it no more."""
