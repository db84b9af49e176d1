"""Figures that more than one kind of process publishes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class StoreSeconds:
    """How long the store takes. `kind` is `write` where the answer means that it is on disk, else `command`.

    Args:
        registry: the process's.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        histogram = Histogram(
            "mta_store_seconds",
            "Round trips to the store, or several of them where one call makes several.",
            ("kind", "outcome"),
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._children = {
            (kind, failed): histogram.labels(kind, "failed" if failed else "ok")
            for kind in ("command", "write")
            for failed in (False, True)
        }

    def __call__(self, kind: str, seconds: float, failed: bool) -> None:
        """Count one call."""
        self._children[kind, failed].observe(seconds)
