"""Histograms of a worker: what a recipe takes until its adapter is in a slot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

BUCKETS_S = (
    *(5e-05, 0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005),
    *(0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
)


@contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Observe the duration of the block, unless it raises."""
    start = time.perf_counter()
    yield
    histogram.observe(time.perf_counter() - start)


def histogram(registry: CollectorRegistry, what: str, meaning: str) -> Histogram:
    return Histogram(f"mta_engine_{what}_seconds", meaning, buckets=BUCKETS_S, registry=registry)


class FusionMetrics:
    """Metrics of a worker; the API process requests them as text."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.fuse = histogram(registry, "fuse", "Time to fuse an admitted recipe into weights in memory.")
        self.load = histogram(registry, "load", "Time to read and pack an adapter that vLLM loads from a folder.")
        self.slot_write = histogram(registry, "slot_write", "Time to copy an adapter into a slot.")
        waiting = "Time that a step waits for an adapter without a slot: the rest of its fusion or load, and the copy."
        self.bring_in = histogram(registry, "bring_in", waiting)
        evictions = "Number of adapters that lost their slot to another adapter."
        self.evictions = Counter("mta_engine_slot_evictions", evictions, registry=registry)

    @property
    def text(self) -> str:
        return generate_latest(self._registry).decode()
