"""The queue in front of the engines: an engine gets no more than one batch, the rest waits here.

Inside an engine they would wait first come, first served; here callers take turns, and the queue is short.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil

from server.errors import TooMany, Unavailable
from server.gateway.access.shares import FairQueue, FairShares
from server.store.tenants.rates import Rates

COUNT_GATEWAYS_S = 2.0
_GATEWAY_LEASE_S = 10.0
_MAX_RETRY_S = 60.0
_PACE_WEIGHT = 0.1
_WIDEST_DIVISOR = 4  # one request to the engines may use at most a quarter of all places


class GatewayShare:
    """This gateway's share of the engines' places: the sequences they compute at once, divided by all gateways."""

    def __init__(
        self, store: Rates, urls: Sequence[str], sequences: Callable[[], int | None], given: int | None
    ) -> None:
        self._store = store
        self._sequences = sequences
        self._given = given
        self._gateways = 1
        self._name = secrets.token_hex(8)
        self._all = f"gateways/{blake2b(' '.join(sorted(urls)).encode(), digest_size=8).hexdigest()}"

    def __call__(self) -> int | None:
        """Return the share, at least 1; None until an engine has reported its size."""
        if self._given is not None or (sequences := self._sequences()) is None:
            return self._given
        return ceil(sequences / self._gateways)

    async def count_gateways(self) -> None:
        """Register this gateway and count all gateways; keep the last number while the store is down."""
        self._gateways = await self._store.acquire(self._all, [self._name], _GATEWAY_LEASE_S) or 1

    async def leave(self) -> None:
        with suppress(Unavailable):  # the lease expires within seconds
            await self._store.release(self._all, self._name)


class EngineLease:
    """A generation's places in the engines; each can be released early, and only once."""

    def __init__(self, release: Callable[[int], None], size: int, waited_s: float) -> None:
        self.waited_s = waited_s
        self._release = release
        self._size = size

    def release(self, size: int | None = None) -> None:
        """Release `size` places; all that are left if None."""
        size = self._size if size is None else min(size, self._size)
        if size:
            self._size -= size
            self._release(size)


@dataclass(eq=False)
class EngineQueue:
    """Assigns places to generations; callers take turns.

    `places` returns the number of sequences the engines compute at once; None while unknown, then nothing waits.
    `max_waiting` None means half the places, which limits the wait to about half the duration of an answer. `waited` is
    called with the seconds of each wait, also of those that gave up, and `refused` with the reason of each refusal.
    """

    places: Callable[[], int | None]
    max_waiting: int | None
    patience_s: float
    waited: Callable[[float], object] = lambda seconds: None
    refused: Callable[[str], object] = lambda reason: None
    _pace_s: float = 0.0  # mean time between two releases
    _last_s: float | None = None  # time of the last release if generations waited then

    def __post_init__(self) -> None:
        self._shares = FairShares(self.places)
        self._line = FairQueue(self._shares)

    @property
    def taken(self) -> int:
        return self._shares.taken

    @property
    def waiting(self) -> int:
        return self._line.waiting

    @property
    def widest(self) -> int | None:
        """Maximum number of sequences in one request to the engines; None while unknown."""
        places = self.places()
        return None if places is None else max(1, places // _WIDEST_DIVISOR)

    def check(self, caller: str, patience_s: float | None) -> None:
        """Raise if `acquire` would refuse the request now: refusing early saves looking up the user."""
        places = self.places()
        if places is not None and self.taken >= places:
            self._check_room(caller, places, self._patience(patience_s), displace=False)

    @asynccontextmanager
    async def acquire(
        self, caller: str, *, size: int = 1, patience_s: float | None = None, begun: bool = False
    ) -> AsyncIterator[EngineLease]:
        """Hold `size` places for the duration of a `with` block, or until they are released.

        `begun` means that another part of the same answer has been admitted already: it waits without a time limit.
        """
        places = self.places()
        size = min(size, places or 0)
        waited_s = await self._enter(caller, size, places, self._patience(patience_s), begun) if places else 0.0
        if not begun:
            self.waited(waited_s)
        lease = EngineLease(lambda size: self._leave(caller, size), size, waited_s)
        try:
            yield lease
        finally:
            lease.release()

    async def _enter(self, caller: str, size: int, places: int, patience_s: float, begun: bool) -> float:
        if self._line.try_acquire(caller, size):
            return 0.0
        start_s = time.monotonic()
        if not begun:
            self._check_room(caller, places, patience_s, displace=True)
        limit_s = None if begun else patience_s
        try:
            await self._line.wait(caller, size, limit_s, patience_s / 2, may_be_refused=not begun)
        except TimeoutError:
            self.waited(time.monotonic() - start_s)
            raise self._refusal("queue_timeout") from None
        return time.monotonic() - start_s

    def _patience(self, given_s: float | None) -> float:
        return self.patience_s if given_s is None else min(given_s, self.patience_s)

    def _check_room(self, caller: str, places: int, patience_s: float, *, displace: bool) -> None:
        """Raise if the queue has no room; with `displace`, refuse the last request of the longest line instead."""
        ahead = self._line.ahead_of(caller)
        if ahead and (ahead + 1) * self._pace_s > patience_s:  # with nobody ahead, let it wait to measure the pace anew
            raise self._refusal("queue_timeout")
        limit = max(1, places // 2) if self.max_waiting is None else self.max_waiting
        if self._line.newcomers < limit:
            return
        if (longest := self._line.longest_beside(caller)) is None:
            raise self._refusal("queue_full")
        if displace:
            self._line.refuse_last(longest, self._refusal("queue_full"))

    def _leave(self, caller: str, size: int) -> None:
        """Release places and update the mean time between two releases, measured while generations wait."""
        now_s = time.monotonic()
        if self._last_s is not None:
            weight = _PACE_WEIGHT if self._pace_s else 1.0
            self._pace_s += weight * (now_s - self._last_s - self._pace_s)
        self._last_s = now_s if self.waiting else None
        self._line.release(caller, size)

    def _refusal(self, reason: str) -> TooMany:
        self.refused(reason)
        return TooMany(
            "the engines are busy and cannot serve this request in time: try again in a moment",
            code="overloaded",
            retry_after_s=min(_MAX_RETRY_S, self.waiting * self._pace_s),
        )
