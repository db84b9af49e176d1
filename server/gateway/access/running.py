"""Requests in progress, of each caller over all gateways."""

from __future__ import annotations

import logging
import secrets
from collections import defaultdict
from dataclasses import dataclass

from server.errors import Unavailable
from server.store.tenants.rates import Rates

log = logging.getLogger("mta.gateway")

LEASE_S = 60.0
RENEW_S = 15.0
"""A gateway that dies takes its requests' seats with it for `LEASE_S`; one that lives renews them in time."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A request's seat among those in progress.

    Attributes:
        caller: whose request it is.
        member: the request's name in the store; empty where nothing is counted.
        free: whether there was one.
    """

    caller: str = ""
    member: str = ""
    free: bool = True


class Running:
    """Who has seats, in the store."""

    def __init__(self, store: Rates) -> None:
        self._store = store
        self._held: defaultdict[str, set[str]] = defaultdict(set)

    async def enter(self, caller: str, most: int) -> Seat:
        """A seat among at most so many; 0 for any number, and so it is while the store is away."""
        if not most:
            return Seat()
        member = secrets.token_hex(8)
        self._held[caller].add(member)
        try:
            if await self._store.hold(_name(caller), [member], LEASE_S, most) is None:
                self._drop(caller, member)
                return Seat(caller, free=False)
        except Unavailable as error:  # it may be counted all the same: its answer was lost
            log.warning("a request in progress is not counted: %s", error.explained)
        return Seat(caller, member)

    async def leave(self, seat: Seat) -> None:
        """Give a seat back."""
        if not seat.member:
            return
        self._drop(seat.caller, seat.member)
        try:
            await self._store.let_go(_name(seat.caller), seat.member)
        except Unavailable as error:
            log.warning("a request in progress counts for another %g s: %s", LEASE_S, error.explained)

    async def renew(self) -> None:
        """Keep the seats of what is still in progress; to be called every `RENEW_S`."""
        for caller, members in list(self._held.items()):
            await self._store.renew(_name(caller), sorted(members), LEASE_S)

    def _drop(self, caller: str, member: str) -> None:
        self._held[caller].discard(member)
        if not self._held[caller]:
            del self._held[caller]


def _name(caller: str) -> str:
    return f"running/{caller}"
