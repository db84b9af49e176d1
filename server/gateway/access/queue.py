"""The line before the engines: how many generations they have at once, how many wait, and who is next.

An engine computes so many sequences in one batch; what it is sent beyond that waits inside it, first come, first
served. So it is sent no more. The rest waits here, where the callers take turns, where a client who leaves frees its
place, and where the line is short: what would wait longer than it may is refused at once, and what is admitted stays
fast.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.errors import TooMany
from server.gateway.operating.metrics import Metrics

_MOST_RETRY_S = 60.0
_PACE_WEIGHT = 0.1


class Place:
    """A generation's place in the engines; it can be given back early, and only once.

    Attributes:
        waited_s: for how long it was waited for.
    """

    def __init__(self, give_back: Callable[[], None], waited_s: float) -> None:
        self.waited_s = waited_s
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """The engines need it no more."""
        if self._give_back:
            give_back, self._give_back = self._give_back, None
            give_back()


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A generation in the line: how many sequences it has, and what tells it that it is its turn."""

    size: int
    turn: asyncio.Future[None]


class EngineQueue:
    """Gives places to generations, in turns over their callers.

    Args:
        places: how many sequences the engines compute at once; None while nobody knows: then nothing waits.
        most_waiting: longest line; None for half as many as there are places: then nobody waits much longer than half
            an answer takes.
        patience_s: longest wait.
        metrics: shows how many wait, and for how long, and who is refused.
    """

    def __init__(
        self, places: Callable[[], int | None], *, most_waiting: int | None, patience_s: float, metrics: Metrics
    ) -> None:
        self._places = places
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._metrics = metrics
        self._lines: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # whose turn is next comes first; none is empty
        self._pace_s = 0.0
        self._last_s: float | None = None
        self.taken = 0
        self.waiting = 0
        metrics.queue_running.set_function(lambda: self.taken)
        metrics.queue_waiting.set_function(lambda: self.waiting)

    def check(self, caller: str, patience_s: float | None) -> None:
        """Refuse at once what `place` would refuse now: shedding costs less than finding out who is asking.

        Raises:
            TooMany: as `place` does.
        """
        places = self._places()
        if places is not None and self.taken >= places:
            self._see_to_room(caller, places, self._patience(patience_s), make=False)

    @asynccontextmanager
    async def place(self, caller: str, *, size: int = 1, patience_s: float | None = None) -> AsyncIterator[Place]:
        """A place in the engines, for the duration of a `with` block or until it is given back.

        Args:
            caller: whose turn it takes.
            size: how many sequences are to be generated.
            patience_s: how long it may wait, if that is less than usual.

        Raises:
            TooMany: when it cannot be had in time.
        """
        places = self._places()
        size = min(size, places or 0)
        waited_s = await self._enter(caller, size, places, patience_s) if places else 0.0
        self._metrics.queue_seconds.observe(waited_s)
        place = Place(lambda: self._leave(size), waited_s)
        try:
            yield place
        finally:
            place.release()

    async def _enter(self, caller: str, size: int, places: int, patience_s: float | None) -> float:
        """Return once the place is taken: after how many seconds."""
        if not self.waiting and self.taken + size <= places:
            self.taken += size
            return 0.0
        start_s, patience_s = time.monotonic(), self._patience(patience_s)
        self._see_to_room(caller, places, patience_s, make=True)
        waiting = _Waiting(size, asyncio.get_running_loop().create_future())
        self._lines.setdefault(caller, deque()).append(waiting)
        self.waiting += 1
        try:
            async with asyncio.timeout(patience_s):
                await waiting.turn
        except TimeoutError:
            self._step_out(caller, waiting)
            self._metrics.queue_seconds.observe(time.monotonic() - start_s)
            raise self._refusal("queue_timeout") from None
        except asyncio.CancelledError:
            self._step_out(caller, waiting)
            raise
        return time.monotonic() - start_s

    def _patience(self, given_s: float | None) -> float:
        return self._patience_s if given_s is None else min(given_s, self._patience_s)

    def _see_to_room(self, caller: str, places: int, patience_s: float, *, make: bool) -> None:
        """Refuse what cannot wait; if need be, `make` whoever came last of the longest line leave it instead."""
        mine = len(self._lines.get(caller, ()))
        ahead = sum(min(len(line), mine + 1) for line in self._lines.values())
        if ahead and (ahead + 1) * self._pace_s > patience_s:  # with nobody ahead it waits, and the pace is learnt anew
            raise self._refusal("queue_timeout")
        most = max(1, places // 2) if self._most_waiting is None else self._most_waiting
        if self.waiting < most:
            return
        longest = max(self._lines, key=lambda name: len(self._lines[name]), default=caller)
        if longest == caller or len(self._lines[longest]) <= mine + 1:
            raise self._refusal("queue_full")
        if make:
            last = self._lines[longest][-1]
            self._remove(longest, last)
            if not last.turn.done():  # it may be leaving at this moment
                last.turn.set_exception(self._refusal("queue_full"))

    def _step_out(self, caller: str, waiting: _Waiting) -> None:
        """Leave the line; or, if the turn came at the same moment, pass it on."""
        if waiting.turn.done() and not waiting.turn.cancelled():
            if waiting.turn.exception() is None:
                self._leave(waiting.size)
        elif waiting in self._lines.get(caller, ()):
            self._remove(caller, waiting)
            self._serve()  # who comes next may need fewer places

    def _remove(self, caller: str, waiting: _Waiting) -> None:
        line = self._lines[caller]
        line.remove(waiting)
        if not line:
            del self._lines[caller]
        self.waiting -= 1

    def _leave(self, size: int) -> None:
        """Give places back."""
        self.taken -= size
        self._keep_pace()
        self._serve()

    def _serve(self) -> None:
        """Give places to those whose turn it is, as far as they go."""
        while self._lines:
            caller, line = next(iter(self._lines.items()))
            first, places = line[0], self._places()
            if places is not None and self.taken and self.taken + first.size > places:
                return
            self._lines.move_to_end(caller)
            self._remove(caller, first)
            if not first.turn.done():
                self.taken += first.size
                first.turn.set_result(None)

    def _keep_pace(self) -> None:
        """Learn how long it takes until another one is served, from the moments when somebody waits."""
        now_s = time.monotonic()
        if self._last_s is not None:
            weight = _PACE_WEIGHT if self._pace_s else 1.0
            self._pace_s += weight * (now_s - self._last_s - self._pace_s)
        self._last_s = now_s if self._lines else None

    def _refusal(self, reason: str) -> TooMany:
        self._metrics.shed.labels(reason).inc()
        return TooMany(
            "the engines are busy, and as many requests wait as can be served in time: try again in a moment",
            code="overloaded",
            retry_after_s=min(_MOST_RETRY_S, self.waiting * self._pace_s),
        )
