"""Fair shares of the places that callers compete for: requests in progress, large bodies, sequences in the engines.

Tenants share places first, then the keys of each. A caller is a key, `<tenant>\\0<key>`, or a tenant without keys.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

MEAN_TIME_S = 30.0  # time constant of the exponential mean of places held
_ACTIVE_S = 10.0  # a caller without a place still counts as active for so long
_RESERVE_FACTOR = 2.5  # times their mean is kept for the other callers: three standard deviations more for one of four
_CREDIT_S = 0.5  # maximum credit for unused places, in seconds of the share: limits a burst to 1.5 times the share


def tenant_of(caller: str) -> str:
    return caller.partition("\0")[0]


class Shares:
    """Counts places that clients may keep for as long as they like.

    A tenant may hold three quarters of what the others leave, and a key two thirds of what is left of that: half of
    all places if it is alone. So a new tenant always finds a free place, and so does a new key of any tenant, however
    many there are. While the number of places is unknown, there is no limit.
    """

    def __init__(self, places: Callable[[], int | None]) -> None:
        self.taken = 0
        self._places = places
        self._held: Counter[str] = Counter()  # by caller and by tenant

    @property
    def free(self) -> float:
        """Number of free places, infinite while the number of places is unknown."""
        places = self._places()
        return math.inf if places is None else places - self.taken

    def may_acquire(self, caller: str, size: int = 1) -> bool:
        """Return whether a caller may take `size` places now; more than exist are allowed if all are free."""
        return not self.taken or (size <= self.free and self.is_within_share(caller, size))

    def is_within_share(self, caller: str, size: int = 1) -> bool:
        """Return whether `size` more places, free or not, are within both shares, as a first request always is."""
        shares = ((caller, self._share(caller)), (tenant := tenant_of(caller), self._tenant_share(tenant)))
        return all(not self._held[name] or self._held[name] + size <= share for name, share in shares)

    def acquire(self, caller: str, size: int = 1) -> None:
        for name in {caller, tenant_of(caller)}:
            self._held[name] += size
            if not self._held[name]:
                del self._held[name]
        self.taken += size

    def release(self, caller: str, size: int = 1) -> None:
        self.acquire(caller, -size)

    def _tenant_share(self, tenant: str) -> float:
        return 0.75 * (self.free + self._held[tenant])

    def _share(self, caller: str) -> float:
        tenant = tenant_of(caller)
        return 2 * (self._tenant_share(tenant) - self._held[tenant])


@dataclass(slots=True)
class _Use:
    """Recent use of places, by one caller or by all."""

    since_s: float
    mean: float = 0.0  # exponential mean of the places held
    credit: float = 0.0  # what the caller recently left unused of its share, in place-seconds

    def add(self, held: int, now_s: float) -> float:
        """Record that `held` places were held since the last call; return the seconds since then."""
        passed_s = now_s - self.since_s
        self.mean += (1 - math.exp(-passed_s / MEAN_TIME_S)) * (held - self.mean)
        self.since_s = now_s
        return passed_s


class FairShares(Shares):
    """Counts places that become free by themselves, such as sequences in an engine.

    A tenant's share is all places divided by the number of active tenants; a caller's is that divided by the number of
    the tenant's active callers. Within these, a caller may take any free place. Beyond its share, it may spend the
    credit for what it recently left unused, which allows short bursts, and it may take places as long as the others
    keep 2.5 times their mean. So places that nobody needs do not stay idle, and a caller that always takes the maximum
    gets no more than its share of what others need.
    """

    def __init__(self, places: Callable[[], int | None]) -> None:
        super().__init__(places)
        self._all = _Use(time.monotonic())
        self._uses: OrderedDict[str, _Use] = OrderedDict()  # of active callers, least recently seen first
        self._active: Counter[str] = Counter()  # number of active callers, by tenant

    def may_acquire(self, caller: str, size: int = 1) -> bool:
        use, held = self._touch(caller), self._held[caller]
        if super().may_acquire(caller, size):
            return True
        if size > self.free:
            return False
        if held + size <= self._share(caller) + use.credit:
            return True
        return self.free - size >= _RESERVE_FACTOR * (self._all.mean - use.mean) - (self.taken - held)

    def acquire(self, caller: str, size: int = 1) -> None:
        self._touch(caller)
        super().acquire(caller, size)

    def _touch(self, caller: str) -> _Use:
        """Mark a caller as active and return its use; update the means and remove inactive callers."""
        now_s = time.monotonic()
        self._all.add(self.taken, now_s)
        while self._uses:
            other, oldest = next(iter(self._uses.items()))
            if now_s < oldest.since_s + _ACTIVE_S:
                break
            if other in self._held:
                self._update(other, oldest, now_s)
            else:
                del self._uses[other]
                self._active -= Counter((tenant_of(other),))
        self._active[tenant_of(caller)] += caller not in self._uses
        use = self._uses.setdefault(caller, _Use(now_s))
        self._update(caller, use, now_s)
        return use

    def _update(self, caller: str, use: _Use, now_s: float) -> None:
        self._uses.move_to_end(caller)
        share, held = self._share(caller), self._held[caller]
        unused = share - held if math.isfinite(share) else 0.0
        use.credit = min(_CREDIT_S * share, use.credit + use.add(held, now_s) * unused)

    def _tenant_share(self, tenant: str, keys: int = 1) -> float:
        places, tenants = self._places(), len(self._active) + (tenant not in self._active)
        return math.inf if places is None else math.ceil(places / tenants / keys)

    def _share(self, caller: str) -> float:
        tenant = tenant_of(caller)
        return self._tenant_share(tenant, self._active[tenant] + (caller not in self._uses))


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    size: int  # number of places it needs
    keep_from_s: float  # when freed places start being kept for it, by the monotonic clock; before, others may pass
    turn: asyncio.Future[None]  # done once it has its places
    may_be_refused: bool  # whether it can be removed from the line in favour of another caller


class FairQueue:
    """Requests that wait for places; tenants take turns, and so do the callers of each.

    No place stays free while a waiting request may take it.
    """

    def __init__(self, shares: Shares) -> None:
        self.waiting = 0
        self._shares = shares
        self._lines: OrderedDict[str, list[Waiter]] = OrderedDict()  # by caller, in order of turns; no line is empty

    @asynccontextmanager
    async def held(self, caller: str) -> AsyncIterator[None]:
        """Hold one place for the duration of a `with` block."""
        if not self.try_acquire(caller, 1):
            await self.wait(caller, 1, None, math.inf)
        try:
            yield
        finally:
            self.release(caller, 1)

    def try_acquire(self, caller: str, size: int) -> bool:
        """Take places without waiting; return whether that was possible."""
        if not self._shares.may_acquire(caller, size) or any(
            self._must_keep_for(other, waiting) for other, line in self._lines.items() for waiting in line
        ):
            return False
        self._shares.acquire(caller, size)
        return True

    async def wait(
        self, caller: str, size: int, patience_s: float | None, passed_for_s: float, *, may_be_refused: bool = True
    ) -> None:
        """Wait in the line for places, or raise `TimeoutError`; smaller requests may pass for `passed_for_s`."""
        keep_from_s = time.monotonic() + passed_for_s
        waiting = Waiter(size, keep_from_s, asyncio.get_running_loop().create_future(), may_be_refused)
        self._lines.setdefault(caller, []).append(waiting)
        self.waiting += 1
        try:
            async with asyncio.timeout(patience_s):
                await waiting.turn
        except BaseException:
            self._leave(caller, waiting)
            raise

    def release(self, caller: str, size: int) -> None:
        self._shares.release(caller, size)
        self._serve()

    @property
    def newcomers(self) -> int:
        """Number of waiting requests that may be refused."""
        return sum(waiting.may_be_refused for line in self._lines.values() for waiting in line)

    def ahead_of(self, caller: str) -> int:
        """Return the number of requests that would be served before a new one of this caller."""
        lengths, tenant = self._lengths(), tenant_of(caller)
        turns = lengths[caller] + 1
        own = sum(min(lengths[other], turns) for other in self._lines if tenant_of(other) == tenant)
        tenants = set(map(tenant_of, self._lines)) - {tenant}
        return own + sum(min(lengths[other], own + 1) for other in tenants)

    def longest_beside(self, caller: str) -> str | None:
        """Return whose last request a new one of `caller` may displace: the longest line of the busiest tenant."""
        lengths = self._lengths()
        busiest = max(self._lines, key=lambda other: (lengths[tenant_of(other)], lengths[other]), default=caller)
        level = str if tenant_of(busiest) == tenant_of(caller) else tenant_of  # compares callers, or tenants
        return busiest if lengths[level(busiest)] > lengths[level(caller)] + 1 else None

    def _lengths(self) -> Counter[str]:
        """Return the number of waiting requests that may be refused, by caller and by tenant."""
        lengths = Counter[str]()
        for caller, line in self._lines.items():
            for name in {caller, tenant_of(caller)}:
                lengths[name] += sum(waiting.may_be_refused for waiting in line)
        return lengths

    def refuse_last(self, caller: str, error: Exception) -> None:
        """Refuse a caller's most recent request that may be refused."""
        last = next(waiting for waiting in reversed(self._lines[caller]) if waiting.may_be_refused)
        self._remove(caller, last)
        if not last.turn.done():  # done if the client is just disconnecting
            last.turn.set_exception(error)

    def _leave(self, caller: str, waiting: Waiter) -> None:
        """Leave the line, or release the places if they were assigned at the same moment."""
        if waiting.turn.done() and not waiting.turn.cancelled():
            if waiting.turn.exception() is None:
                self.release(caller, waiting.size)
        elif waiting in self._lines.get(caller, ()):
            self._remove(caller, waiting)
            self._serve()  # the next request may need fewer places

    def _remove(self, caller: str, waiting: Waiter) -> None:
        line = self._lines[caller]
        line.remove(waiting)
        if not line:
            del self._lines[caller]
        self.waiting -= 1

    def _serve(self) -> None:
        """Give the free places to the waiting requests, in turn."""
        while next_in_line := self._next():
            caller, waiting = next_in_line
            for other in [*(other for other in self._lines if tenant_of(other) == tenant_of(caller)), caller]:
                self._lines.move_to_end(other)
            self._remove(caller, waiting)
            if not waiting.turn.done():
                self._shares.acquire(caller, waiting.size)
                waiting.turn.set_result(None)

    def _next(self) -> tuple[str, Waiter] | None:
        """Return the request whose turn it is; callers below their share go first."""
        if self._shares.free < 1 and self._shares.taken:
            return None
        beyond = None
        for caller, line in self._lines.items():
            asked = set[int]()  # sizes: whoever needs as many places is answered alike
            for waiting in line:
                if waiting.size not in asked and self._shares.may_acquire(caller, waiting.size):
                    if self._shares.is_within_share(caller, waiting.size):
                        return caller, waiting
                    beyond = beyond or (caller, waiting)
                elif self._must_keep_for(caller, waiting):
                    return None
                asked.add(waiting.size)
        return beyond

    def _must_keep_for(self, caller: str, waiting: Waiter) -> bool:
        """Return whether freed places must be kept for a request, because others have passed it for long enough."""
        return (
            waiting.size > self._shares.free
            and time.monotonic() >= waiting.keep_from_s
            and self._shares.is_within_share(caller, waiting.size)
        )
