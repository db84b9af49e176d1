"""What the engine measures about adapters, where it happens: durations and counts that `/metrics` shows.

A worker's go to the API process as plain numbers, when somebody asks for them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

BUCKETS_S = (
    *(5e-05, 0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005),
    *(0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
)
"""Upper ends of the buckets that durations are counted in; what is longer has a bucket of its own."""

Reading = tuple[list[int], float]
"""How often in each bucket, and the sum in seconds."""


class Durations:
    """A histogram of one kind of work, which several threads may do."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one piece of work."""
        with self._lock:
            self._counts[bisect_left(BUCKETS_S, seconds)] += 1
            self._sum_s += seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what the block takes, unless it fails."""
        start = time.perf_counter()
        yield
        self.observe(time.perf_counter() - start)

    @property
    def count(self) -> int:
        """How often it was done."""
        return sum(self._counts)

    @property
    def reading(self) -> Reading:
        """What was counted up to now."""
        with self._lock:
            return list(self._counts), self._sum_s


class WorkerFigures:
    """What one worker measures.

    Attributes:
        fuse: from a recipe to weights in memory, wherever it runs.
        load: vLLM's reading and packing of an adapter from a folder.
        slot_write: copying an adapter into its slot.
        bring_in: what a step waits for an adapter that has no slot: the rest of its making, and the copy.
        evictions: slots taken from an adapter for another.
    """

    def __init__(self) -> None:
        self.fuse, self.load, self.slot_write, self.bring_in = Durations(), Durations(), Durations(), Durations()
        self.evictions = 0

    def readings(self) -> tuple[dict[str, Reading], dict[str, int]]:
        """Durations and counts by the end of their metric's name."""
        durations = {"fuse": self.fuse, "load": self.load, "slot_write": self.slot_write, "bring_in": self.bring_in}
        counts = {"fuses": self.fuse.count, "slot_evictions": self.evictions}
        return {name: kind.reading for name, kind in durations.items()}, counts
