"""What the gateway counts. Every label has a fixed, small set of values: no user, no recipe, no path."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "mta_requests",
            "Requests answered; level is set for generations.",
            ("route", "method", "status", "level"),
            registry=self._registry,
        )
        self.stages = Histogram(
            "mta_stage_seconds",
            "Where generations spent their time.",
            ("stage",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self.fallbacks = Counter(
            "mta_fallbacks",
            "Generations served by less than the user's own recipe because the engine could not serve it.",
            registry=self._registry,
        )
        self.broken_streams = Counter(
            "mta_broken_streams", "Streams that ended in an error event.", ("code",), registry=self._registry
        )
        self.disconnects = Counter(
            "mta_disconnects", "Generations whose client left before the end.", registry=self._registry
        )
        self.profile_changes = Counter(
            "mta_profile_changes", "Profile items added, removed or replaced.", registry=self._registry
        )
        self.bank = Gauge("mta_bank_info", "The bank served.", ("bank",), registry=self._registry)
        ProcessCollector(registry=self._registry)

    def observe(self, timings_ms: dict[str, float]) -> None:
        """Count the stages of one generation."""
        for stage, milliseconds in timings_ms.items():
            self.stages.labels(stage).observe(milliseconds / 1000)

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)
