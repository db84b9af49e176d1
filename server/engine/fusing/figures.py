"""What a worker measures about adapters, where it happens; the API process asks for it as text (`metrics.py`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

BUCKETS_S = (
    *(5e-05, 0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005),
    *(0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
)


def durations(registry: CollectorRegistry, what: str, meaning: str) -> Histogram:
    return Histogram(f"mta_engine_{what}_seconds", meaning, buckets=BUCKETS_S, registry=registry)


@contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Count what the block takes, unless it fails."""
    start = time.perf_counter()
    yield
    histogram.observe(time.perf_counter() - start)


class WorkerFigures:
    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.fuse = durations(registry, "fuse", "From an admitted recipe to its weights in memory, in any thread.")
        self.load = durations(registry, "load", "Reading and packing of an adapter that vLLM loads from a folder.")
        self.slot_write = durations(registry, "slot_write", "Copying an adapter into a slot.")
        self.bring_in = durations(
            registry,
            "bring_in",
            "What a step of the model waits for an adapter that is in no slot: the end of its making and the copy.",
        )
        self.evictions = Counter(
            "mta_engine_slot_evictions", "Slots taken from one adapter for another.", registry=registry
        )

    @property
    def text(self) -> str:
        return generate_latest(self._registry).decode()
