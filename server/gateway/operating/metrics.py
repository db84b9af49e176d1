"""What the gateway counts. Every label has a fixed, small set of values: no user, no recipe, no path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class EngineFigures(Protocol):
    """What one engine says of its adapters; see `server/gateway/engines/admin.py`."""

    @property
    def slots(self) -> int | None: ...
    @property
    def slots_taken(self) -> int | None: ...
    @property
    def prepares(self) -> int | None: ...
    @property
    def fuses(self) -> int | None: ...


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
        self.ttft = Histogram(
            "mta_ttft_seconds",
            "From the arrival of a request to its first token, where the engine streams.",
            ("level",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "mta_inter_token_seconds",
            "Between two pieces of a streamed answer, a token each.",
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
        self.jobs = Gauge(
            "mta_jobs",
            "About how many adapt jobs of the bank are queued or running.",
            ("state",),
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)

    def watch(self, engines: Callable[[], Sequence[EngineFigures | None]]) -> None:
        """Show what engines say of themselves, as it is known whenever somebody asks."""
        self._registry.register(_Engines(engines))

    def observe(self, timings_ms: dict[str, float]) -> None:
        """Count the stages of one generation."""
        for stage, milliseconds in timings_ms.items():
            self.stages.labels(stage).observe(milliseconds / 1000)

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """Each engine by its place among those that the gateway knows."""

    def __init__(self, engines: Callable[[], Sequence[EngineFigures | None]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("mta_engine_up", "Whether an engine answers.", labels=("engine",))
        slots = GaugeMetricFamily("mta_engine_slots", "An engine's LoRA slots.", labels=("engine",))
        resident = GaugeMetricFamily(
            "mta_engine_slots_resident", "How many of an engine's slots hold an adapter.", labels=("engine",)
        )
        prepares = CounterMetricFamily(
            "mta_engine_prepares",
            "Requests that an engine made an adapter ready for: warm ones found it there, cold ones had it fused.",
            labels=("engine", "kind"),
        )
        for place, figures in enumerate(self._engines()):
            engine = str(place)
            up.add_metric((engine,), float(figures is not None))
            if figures is None:
                continue
            for family, value in ((slots, figures.slots), (resident, figures.slots_taken)):
                if value is not None:
                    family.add_metric((engine,), value)
            if figures.prepares is not None and figures.fuses is not None:
                prepares.add_metric((engine, "cold"), figures.fuses)
                prepares.add_metric((engine, "warm"), max(0, figures.prepares - figures.fuses))
        yield from (up, slots, resident, prepares)
