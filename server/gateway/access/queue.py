"""The line before the engines: how many generations they have at once, how many wait, and who is next.

An engine computes so many sequences in one batch; what it is sent beyond that waits inside it, first come, first
served. So it is sent no more. The rest waits here, where the callers take turns, where a client who leaves frees its
place, and where the line is short: what would wait longer than it may is refused at once, and what is admitted stays
fast.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import blake2b
from math import ceil

from server.errors import TooMany, Unavailable
from server.gateway.access.shares import FairQueue, FairShares
from server.store.tenants.rates import Rates

COUNT_GATEWAYS_S = 2.0
_GATEWAY_LEASE_S = 10.0
_MOST_RETRY_S = 60.0
_PACE_WEIGHT = 0.1
_WIDEST = 4
"""The part of all places that one request to the engines may need: a quarter."""


class GatewayShare:
    """Shares the engines' places, as many as the sequences that they compute at once, evenly among all gateways."""

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
        """The share, at least 1; None while no engine has said anything."""
        if self._given is not None or (sequences := self._sequences()) is None:
            return self._given
        return ceil(sequences / self._gateways)

    async def count_gateways(self) -> None:
        """Be counted, and count the others; while the store is away their last number stays."""
        self._gateways = await self._store.acquire(self._all, [self._name], _GATEWAY_LEASE_S) or 1

    async def leave(self) -> None:
        """Leave this share to the others at once; a store that cannot be told forgets it in a few seconds."""
        with suppress(Unavailable):
            await self._store.release(self._all, self._name)


class EngineLease:
    """A generation's places in the engines; they can be given back early, one by one or all, and only once."""

    def __init__(self, release: Callable[[int], None], size: int, waited_s: float) -> None:
        self.waited_s = waited_s
        self._release = release
        self._size = size

    def release(self, size: int | None = None) -> None:
        """The engines need so many no more; None for all."""
        size = self._size if size is None else min(size, self._size)
        if size:
            self._size -= size
            self._release(size)


class EngineQueue:
    """Gives places to generations, in turns over their callers.

    Args:
        places: how many sequences the engines compute at once; None while nobody knows: then nothing waits.
        most_waiting: longest line; None for half as many as there are places: then nobody waits much longer than half
            an answer takes.
        waited: called with the seconds that each waited, those given up included.
        refused: called with the reason whenever a generation is.
    """

    def __init__(
        self,
        places: Callable[[], int | None],
        *,
        most_waiting: int | None,
        patience_s: float,
        waited: Callable[[float], object] = lambda seconds: None,
        refused: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self._places = places
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._waited = waited
        self._refused = refused
        self._shares = FairShares(places)
        self._line = FairQueue(self._shares)
        self._pace_s = 0.0
        self._last_s: float | None = None

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self._shares.taken

    @property
    def waiting(self) -> int:
        """How many generations wait."""
        return self._line.waiting

    @property
    def widest(self) -> int | None:
        """Most sequences that one request to the engines may have; None while nobody knows."""
        places = self._places()
        return None if places is None else max(1, places // _WIDEST)

    def check(self, caller: str, patience_s: float | None) -> None:
        """Refuse at once what `acquire` would refuse now: shedding costs less than finding out who is asking."""
        places = self._places()
        if places is not None and self.taken >= places:
            self._see_to_room(caller, places, self._patience(patience_s), make=False)

    @asynccontextmanager
    async def acquire(
        self, caller: str, *, size: int = 1, patience_s: float | None = None, begun: bool = False
    ) -> AsyncIterator[EngineLease]:
        """Places for so many sequences, for the duration of a `with` block or until they are given back.

        A `begun` answer has places for another part already, and waits as long as it takes.
        """
        places = self._places()
        size = min(size, places or 0)
        waited_s = await self._enter(caller, size, places, self._patience(patience_s), begun) if places else 0.0
        if not begun:
            self._waited(waited_s)
        lease = EngineLease(lambda size: self._leave(caller, size), size, waited_s)
        try:
            yield lease
        finally:
            lease.release()

    async def _enter(self, caller: str, size: int, places: int, patience_s: float, begun: bool) -> float:
        """Return once the places are taken: after how many seconds."""
        if self._line.try_acquire(caller, size):
            return 0.0
        start_s = time.monotonic()
        passed_for_s = patience_s / 2
        if begun:
            await self._line.wait(caller, size, None, passed_for_s, may_be_refused=False)
            return time.monotonic() - start_s
        self._see_to_room(caller, places, patience_s, make=True)
        try:
            await self._line.wait(caller, size, patience_s, passed_for_s)
        except TimeoutError:
            self._waited(time.monotonic() - start_s)
            raise self._refusal("queue_timeout") from None
        return time.monotonic() - start_s

    def _patience(self, given_s: float | None) -> float:
        return self._patience_s if given_s is None else min(given_s, self._patience_s)

    def _see_to_room(self, caller: str, places: int, patience_s: float, *, make: bool) -> None:
        """Refuse what cannot wait; if need be, `make` whoever came last of the longest line leave it instead."""
        ahead = self._line.ahead_of(caller)
        if ahead and (ahead + 1) * self._pace_s > patience_s:  # with nobody ahead it waits, and the pace is learnt anew
            raise self._refusal("queue_timeout")
        most = max(1, places // 2) if self._most_waiting is None else self._most_waiting
        if self._line.newcomers < most:
            return
        longest = self._line.longest()
        if longest is None or longest == caller or self._line.length(longest) <= self._line.length(caller) + 1:
            raise self._refusal("queue_full")
        if make:
            self._line.refuse_last(longest, self._refusal("queue_full"))

    def _leave(self, caller: str, size: int) -> None:
        """Give places back."""
        self._keep_pace()
        self._line.release(caller, size)

    def _keep_pace(self) -> None:
        """Learn how long it takes until another one is served, from the moments when somebody waits."""
        now_s = time.monotonic()
        if self._last_s is not None:
            weight = _PACE_WEIGHT if self._pace_s else 1.0
            self._pace_s += weight * (now_s - self._last_s - self._pace_s)
        self._last_s = now_s if self.waiting else None

    def _refusal(self, reason: str) -> TooMany:
        self._refused(reason)
        return TooMany(
            "the engines are busy, and as many requests wait as can be served in time: try again in a moment",
            code="overloaded",
            retry_after_s=min(_MOST_RETRY_S, self.waiting * self._pace_s),
        )
