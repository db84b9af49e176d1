"""What the engine measures about adapters, where it happens, for `/metrics`.

A worker's go to the API process as plain numbers and names, when somebody asks for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram

BUCKETS_S = (
    *(5e-05, 0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005),
    *(0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
)
"""Upper ends of the buckets that durations are counted in; what is longer has a bucket of its own."""

Sample = tuple[str, dict[str, str], float]
"""A sample's name, labels and value."""

Family = tuple[str, str, str, list[Sample]]
"""A metric's name, meaning, type and samples."""


def durations(registry: CollectorRegistry, what: str, meaning: str) -> Histogram:
    return Histogram(f"mta_engine_{what}_seconds", meaning, buckets=BUCKETS_S, registry=registry)


def families(registry: CollectorRegistry) -> list[Family]:
    """What a registry has, but not since when."""
    return [
        (m.name, m.documentation, m.type, [(s.name, s.labels, s.value) for s in m.samples if s.name[-8:] != "_created"])
        for m in registry.collect()
    ]


@contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Count what the block takes, unless it fails."""
    start = time.perf_counter()
    yield
    histogram.observe(time.perf_counter() - start)


class WorkerFigures:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
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
