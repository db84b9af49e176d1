"""How an engine ends in order: it takes nothing new, finishes what it has begun, and only then lets vLLM stop.

vLLM's own way is to answer what arrives meanwhile with an empty text. Here it is refused with 503, which sends a router
on to another engine, and `/health` says the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("mta.engine")


def _stop_vllm() -> None:
    """Vllm stops at once on either signal; the other one is still its own."""
    os.kill(os.getpid(), signal.SIGINT)


class Drain:
    """Counts what is under way, and waits for its end once the engine is asked to stop.

    Args:
        most_s: how long it may take.
        stop: ends the engine.

    Attributes:
        begun: whether nothing new is taken.
    """

    def __init__(self, most_s: float, stop: Callable[[], None] = _stop_vllm) -> None:
        self.begun = False
        self._most_s = most_s
        self._stop = stop
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending: asyncio.Task[None] | None = None  # the event loop holds tasks only weakly

    def take_over(self) -> None:
        """Have SIGTERM begin the drain; vLLM's handler must be in place."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.begin)

    def begin(self) -> None:
        """Take nothing new, and end the engine once nothing is under way, or the time is up."""
        if not self.begun:
            self.begun = True
            log.info("asked to stop: %d requests are finished first, for at most %g s", self._under_way, self._most_s)
            self._ending = asyncio.get_running_loop().create_task(self._end())

    @contextmanager
    def request(self) -> Iterator[None]:
        """Something is under way until the block ends."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _end(self) -> None:
        try:
            await asyncio.wait_for(self._idle.wait(), self._most_s)
        except TimeoutError:
            log.warning("%d requests are cut off: they took more than %g s", self._under_way, self._most_s)
        self._stop()
