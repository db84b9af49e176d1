"""Places that callers compete for, and the one rule of who may take another: of requests, large bodies, the engines."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

LATELY_S = 60.0


class Shares:
    """How many places each caller has.

    Where clients decide how long they keep them, a caller may have as many as it leaves free: alone, half of them. So
    however many callers come, the next one finds some.

    Where they soon come back by themselves, a caller's share is all places divided evenly among the callers who are
    there. It may take another one within its share; and beyond it, as long as enough stay free for what the others had
    lately, up to their shares. So the others find what they need, and what nobody needs lies idle for nobody.

    Args:
        places: how many there are; None while nobody knows: then everybody may take one.
        come_back: whether they do so by themselves.

    Attributes:
        taken: how many are.
    """

    def __init__(self, places: Callable[[], int | None], *, come_back: bool = False) -> None:
        self.taken = 0
        self._places = places
        self._come_back = come_back
        self._held: Counter[str] = Counter()
        self._most: dict[str, tuple[int, float]] = {}  # by caller, of which there are no more than keys, and when

    @property
    def free(self) -> float:
        """How many are."""
        places = self._places()
        return math.inf if places is None else places - self.taken

    def may_take(self, caller: str, size: int = 1, waiting: Callable[[], set[str]] = set) -> bool:
        """Whether a caller may take so many places now.

        Args:
            caller: who.
            size: how many at once; more than there are fit when all are free.
            waiting: the callers in line, who are there too.
        """
        if not self.taken:
            return True
        if size > self.free:
            return False
        if self.is_within_share(caller, size, waiting):
            return True
        if not self._come_back:
            return False
        others = (self._held.keys() | waiting()) - {caller}
        share = self._share(others)
        kept = sum(max(0.0, min(share, self._lately(other)) - self._held[other]) for other in others)
        return self.free - size >= kept

    def is_within_share(self, caller: str, size: int, waiting: Callable[[], set[str]] = set) -> bool:
        """Whether a caller's share has so many more places, free or not; a first one, however wide, it always has."""
        if not (held := self._held[caller]):
            return True
        share = self._share((self._held.keys() | waiting()) - {caller}) if self._come_back else self.free
        return held + size <= share

    def take(self, caller: str, size: int = 1) -> None:
        """Count places as taken."""
        self._held[caller] += size
        self.taken += size
        if self._held[caller] >= self._lately(caller):
            self._most[caller] = self._held[caller], time.monotonic()

    def give_back(self, caller: str, size: int = 1) -> None:
        """Count places as free again."""
        self._held[caller] -= size
        if not self._held[caller]:
            del self._held[caller]
        self.taken -= size

    def _share(self, others: set[str]) -> float:
        places = self._places()
        return math.inf if places is None else math.ceil(places / (len(others) + 1))

    def _lately(self, caller: str) -> int:
        """How many places a caller had at most within the last `LATELY_S`."""
        most, when_s = self._most.get(caller, (0, 0.0))
        return most if time.monotonic() < when_s + LATELY_S else self._held[caller]


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
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


class Line:
    """Who waits for places, in turns over their callers. No place stays free while somebody waits who may take it.

    Args:
        shares: the places.

    Attributes:
        waiting: how many do.
    """

    def __init__(self, shares: Shares) -> None:
        self.waiting = 0
        self._shares = shares
        self._lines: OrderedDict[str, list[Waiting]] = OrderedDict()  # whose turn is next comes first; none is empty

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[None]:
        """One place, for the duration of a `with` block."""
        if not self.enters(caller, 1):
            await self.turn(caller, 1, None, math.inf)
        try:
            yield
        finally:
            self.leave(caller, 1)

    def enters(self, caller: str, size: int) -> bool:
        """Take places if that can be done at once."""
        if not self._shares.may_take(caller, size, self._callers) or any(
            self._keeps(other, waiting) for other, line in self._lines.items() for waiting in line
        ):
            return False
        self._shares.take(caller, size)
        return True

    async def turn(
        self, caller: str, size: int, patience_s: float | None, passed_for_s: float, *, may_be_refused: bool = True
    ) -> None:
        """Wait for places.

        Args:
            caller: whose turn it takes.
            size: how many places.
            patience_s: longest wait; None for any.
            passed_for_s: for how long others who need fewer may pass.
            may_be_refused: whether `refuse_last` may choose it.

        Raises:
            TimeoutError: when it took too long.
        """
        keeps_from_s = time.monotonic() + passed_for_s
        waiting = Waiting(size, keeps_from_s, asyncio.get_running_loop().create_future(), may_be_refused)
        self._lines.setdefault(caller, []).append(waiting)
        self.waiting += 1
        try:
            async with asyncio.timeout(patience_s):
                await waiting.turn
        except BaseException:
            self._step_out(caller, waiting)
            raise

    def leave(self, caller: str, size: int) -> None:
        """Give places back."""
        self._shares.give_back(caller, size)
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

    def _step_out(self, caller: str, waiting: Waiting) -> None:
        """Leave the line; or, if the turn came at the same moment, pass it on."""
        if waiting.turn.done() and not waiting.turn.cancelled():
            if waiting.turn.exception() is None:
                self.leave(caller, waiting.size)
        elif waiting in self._lines.get(caller, ()):
            self._remove(caller, waiting)
            self._serve()  # who comes next may need fewer places

    def _remove(self, caller: str, waiting: Waiting) -> None:
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
                self._shares.take(caller, waiting.size)
                waiting.turn.set_result(None)

    def _next(self) -> tuple[str, Waiting] | None:
        """Whose turn it is: first of those who have fewer places than their share."""
        if self._shares.free < 1 and self._shares.taken:
            return None
        beyond = None
        for caller, line in self._lines.items():
            for waiting in line:
                if self._shares.may_take(caller, waiting.size, self._callers):
                    if self._shares.is_within_share(caller, waiting.size, self._callers):
                        return caller, waiting
                    beyond = beyond or (caller, waiting)
                elif self._keeps(caller, waiting):
                    return None
        return beyond

    def _keeps(self, caller: str, waiting: Waiting) -> bool:
        """Whether places are kept for somebody who has been passed for long enough."""
        return (
            time.monotonic() >= waiting.keeps_from_s
            and waiting.size > self._shares.free
            and self._shares.is_within_share(caller, waiting.size, self._callers)
        )

    def _callers(self) -> set[str]:
        return set(self._lines)
