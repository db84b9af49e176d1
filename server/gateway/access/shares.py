"""Places that callers compete for, and the one rule of who may take another: of requests, large bodies, the engines."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

LATELY_S = 30.0
"""Over which a mean is taken: what is longer ago counts e times less."""
_PRESENT_S = 10.0
"""For how long a caller who has no place is still there."""
_KEPT = 2.5
"""How many times their mean others find free: of four who come by chance that is three standard deviations more."""
_CREDIT_S = 0.5
"""The longest for which unused places count: so a burst is at most half as much again as the share."""


class Shares:
    """How many places each caller has, where clients decide how long they keep them.

    A caller may have as many as it leaves free: alone, half of them. So however many callers come, the next one finds
    some.

    While nobody knows how many there are, everybody may take one.
    """

    def __init__(self, places: Callable[[], int | None]) -> None:
        self.taken = 0
        self._places = places
        self._held: Counter[str] = Counter()

    @property
    def free(self) -> float:
        """How many are."""
        places = self._places()
        return math.inf if places is None else places - self.taken

    def may_acquire(self, caller: str, size: int = 1) -> bool:
        """Whether a caller may take so many places now; more than there are it may when all are free."""
        return not self.taken or (size <= self.free and self.is_within_share(caller, size))

    def is_within_share(self, caller: str, size: int = 1) -> bool:
        """Whether a caller's share has so many more places, free or not; a first one, however wide, it always has."""
        held = self._held[caller]
        return not held or held + size <= self._share(caller)

    def arrives(self, caller: str) -> None:
        """Know that a caller is there, though it has no place yet."""

    def acquire(self, caller: str, size: int = 1) -> None:
        """Count places as taken."""
        self._held[caller] += size
        self.taken += size

    def release(self, caller: str, size: int = 1) -> None:
        """Count places as free again."""
        self._held[caller] -= size
        if not self._held[caller]:
            del self._held[caller]
        self.taken -= size

    def _share(self, caller: str) -> float:
        return self.free


class _Mean:
    """How many places were held lately, on average."""

    def __init__(self, now_s: float) -> None:
        self.value = 0.0
        self.since_s = now_s

    def add(self, held: int, now_s: float) -> float:
        """Count that so many were held until now; after how many seconds."""
        passed_s = now_s - self.since_s
        self.value += (1 - math.exp(-passed_s / LATELY_S)) * (held - self.value)
        self.since_s = now_s
        return passed_s


class _Use(_Mean):
    """One caller's use: `credit`, the places that it left unused of its share lately, times seconds."""

    credit = 0.0


class FairShares(Shares):
    """How many places each caller has, where they come back by themselves.

    A caller's share is all places divided evenly among the callers who are there. Within its share it may take what is
    free. Beyond it, it may take what it has left unused lately, so that who comes by chance may come in bursts; and
    what leaves enough to the others: 2.5 times what they had on average. So what nobody needs lies idle for nobody, and
    who takes all that it may, all the time, has no more than its share of what others need.
    """

    def __init__(self, places: Callable[[], int | None]) -> None:
        super().__init__(places)
        self._all = _Mean(time.monotonic())
        self._uses: OrderedDict[str, _Use] = OrderedDict()  # of those who are there; seen longest ago comes first

    def may_acquire(self, caller: str, size: int = 1) -> bool:
        """As `Shares.may_acquire`, and beyond the share as above."""
        use, held = self._seen(caller), self._held[caller]
        if super().may_acquire(caller, size):
            return True
        if size > self.free:
            return False
        if held + size <= self._share(caller) + use.credit:
            return True
        return self.free - size >= _KEPT * (self._all.value - use.value) - (self.taken - held)

    def arrives(self, caller: str) -> None:
        """As `Shares.arrives`: from now on the caller counts."""
        self._seen(caller)

    def acquire(self, caller: str, size: int = 1) -> None:
        """As `Shares.acquire`."""
        self._seen(caller)
        super().acquire(caller, size)

    def release(self, caller: str, size: int = 1) -> None:
        """As `Shares.release`."""
        self._seen(caller)
        super().release(caller, size)

    def _seen(self, caller: str) -> _Use:
        """A caller's use until now, and everybody's; forgets callers who have not been there for long."""
        now_s = time.monotonic()
        self._all.add(self.taken, now_s)
        while self._uses:
            other, oldest = next(iter(self._uses.items()))
            if now_s < oldest.since_s + _PRESENT_S:
                break
            if other in self._held:
                self._count(other, oldest, now_s)
            else:
                del self._uses[other]
        use = self._uses.setdefault(caller, _Use(now_s))
        self._count(caller, use, now_s)
        return use

    def _count(self, caller: str, use: _Use, now_s: float) -> None:
        self._uses.move_to_end(caller)
        share, held = self._share(caller), self._held[caller]
        unused = share - held if math.isfinite(share) else 0.0
        use.credit = min(_CREDIT_S * share, use.credit + use.add(held, now_s) * unused)

    def _share(self, caller: str) -> float:
        places = self._places()
        return math.inf if places is None else math.ceil(places / (len(self._uses) + (caller not in self._uses)))


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    """Somebody in a line.

    Attributes:
        size: how many places they need.
        keeps_from_s: until then others who need fewer may pass; from then on places are kept as they come free.
        turn: tells them that they have them.
        may_be_refused: whether somebody else may take their place in the line.
    """

    size: int
    keeps_from_s: float
    turn: asyncio.Future[None]
    may_be_refused: bool


class FairQueue:
    """Who waits for places, in turns over their callers. No place stays free while somebody waits who may take it."""

    def __init__(self, shares: Shares) -> None:
        self.waiting = 0
        self._shares = shares
        self._lines: OrderedDict[str, list[Waiter]] = OrderedDict()  # whose turn is next comes first; none is empty

    @asynccontextmanager
    async def held(self, caller: str) -> AsyncIterator[None]:
        """One place, for the duration of a `with` block."""
        if not self.try_acquire(caller, 1):
            await self.wait(caller, 1, None, math.inf)
        try:
            yield
        finally:
            self.release(caller, 1)

    def try_acquire(self, caller: str, size: int) -> bool:
        """Take places if that can be done at once."""
        if not self._shares.may_acquire(caller, size) or any(
            self._keeps(other, waiting) for other, line in self._lines.items() for waiting in line
        ):
            return False
        self._shares.acquire(caller, size)
        return True

    async def wait(
        self, caller: str, size: int, patience_s: float | None, passed_for_s: float, *, may_be_refused: bool = True
    ) -> None:
        """Wait for places; others who need fewer may pass for `passed_for_s`.

        Raises:
            TimeoutError: when it took longer than `patience_s`.
        """
        keeps_from_s = time.monotonic() + passed_for_s
        waiting = Waiter(size, keeps_from_s, asyncio.get_running_loop().create_future(), may_be_refused)
        self._shares.arrives(caller)
        self._lines.setdefault(caller, []).append(waiting)
        self.waiting += 1
        try:
            async with asyncio.timeout(patience_s):
                await waiting.turn
        except BaseException:
            self._step_out(caller, waiting)
            raise

    def release(self, caller: str, size: int) -> None:
        """Give places back."""
        self._shares.release(caller, size)
        self._serve()

    @property
    def newcomers(self) -> int:
        """How many of those who wait may be refused."""
        return sum(map(self.length, self._lines))

    def length(self, caller: str) -> int:
        """How many of a caller's newcomers wait."""
        return sum(waiting.may_be_refused for waiting in self._lines.get(caller, ()))

    def ahead_of(self, caller: str) -> int:
        """How many would be served before another one of the caller's, for callers take turns."""
        mine = self.length(caller)
        return sum(min(self.length(other), mine + 1) for other in self._lines)

    def longest(self) -> str | None:
        """The caller who has most waiting."""
        return max(self._lines, key=self.length, default=None)

    def refuse_last(self, caller: str, error: Exception) -> None:
        """Send away which of a caller's newcomers came last."""
        last = next(waiting for waiting in reversed(self._lines[caller]) if waiting.may_be_refused)
        self._remove(caller, last)
        if not last.turn.done():  # it may be leaving at this moment
            last.turn.set_exception(error)

    def _step_out(self, caller: str, waiting: Waiter) -> None:
        """Leave the line; or, if the turn came at the same moment, pass it on."""
        if waiting.turn.done() and not waiting.turn.cancelled():
            if waiting.turn.exception() is None:
                self.release(caller, waiting.size)
        elif waiting in self._lines.get(caller, ()):
            self._remove(caller, waiting)
            self._serve()  # who comes next may need fewer places

    def _remove(self, caller: str, waiting: Waiter) -> None:
        line = self._lines[caller]
        line.remove(waiting)
        if not line:
            del self._lines[caller]
        self.waiting -= 1

    def _serve(self) -> None:
        """Give places to those whose turn it is, as far as they go."""
        while found := self._next():
            caller, waiting = found
            self._lines.move_to_end(caller)
            self._remove(caller, waiting)
            if not waiting.turn.done():
                self._shares.acquire(caller, waiting.size)
                waiting.turn.set_result(None)

    def _next(self) -> tuple[str, Waiter] | None:
        """Whose turn it is: first of those who have fewer places than their share."""
        if self._shares.free < 1 and self._shares.taken:
            return None
        beyond = None
        for caller, line in self._lines.items():
            for waiting in line:
                if self._shares.may_acquire(caller, waiting.size):
                    if self._shares.is_within_share(caller, waiting.size):
                        return caller, waiting
                    beyond = beyond or (caller, waiting)
                elif self._keeps(caller, waiting):
                    return None
        return beyond

    def _keeps(self, caller: str, waiting: Waiter) -> bool:
        """Whether places are kept for somebody who has been passed for long enough."""
        return (
            time.monotonic() >= waiting.keeps_from_s
            and waiting.size > self._shares.free
            and self._shares.is_within_share(caller, waiting.size)
        )
