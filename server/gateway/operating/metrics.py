"""What the gateway counts. Every label has a fixed, small set of values: no user, no recipe, no path.

A tenant is a label only where the settings name it; all others together are `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.gateway.engines.admin import EngineFigures
from server.gateway.operating.health import Readiness
from server.store.durability import Memory
from server.watching.background import BUCKETS_S, StoreSeconds

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"

GENERATING = frozenset(("/generate", "/v1/chat/completions", "/v1/completions"))
"""The paths whose POSTs are generations."""

_OUTCOMES = {429: "limited", 499: "gone", 503: "unavailable"}


class Metrics:
    """The metrics of one gateway, in a registry of its own; labels name these `tenants` alone."""

    def __init__(self, tenants: Iterable[str] = ()) -> None:
        self._registry = registry = CollectorRegistry()
        self._tenants = frozenset(tenants)

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(name, says, labels, registry=registry)

        def gauge(name: str, says: str, *labels: str) -> Gauge:
            return Gauge(name, says, labels, registry=registry)

        def seconds(name: str, says: str, *labels: str) -> Histogram:
            return Histogram(name, says, labels, buckets=BUCKETS_S, registry=registry)

        self.requests = counter(
            "mta_requests", "Requests answered; level is set for generations.", "route", "method", "status", "level"
        )
        self.generations = counter(
            "mta_generations",
            "Generations by how they ended: answered, refused (4xx), limited (429), unavailable (503), failed (other "
            "5xx), broken (an error amid a stream) or gone (the client left).",
            *("tenant", "level", "outcome"),
        )
        for tenant in self._tenants | {OTHER}:
            for outcome in ("refused", "limited", "unavailable", "failed"):
                self.generations.labels(tenant, "", outcome)  # from zero on: a first failure is an increase
        self.stages = seconds("mta_stage_seconds", "Where generations spent their time.", "stage")
        self.ttft = seconds(
            "mta_ttft_seconds", "From the arrival of a request to its first token, where the engine streams.", "level"
        )
        self.inter_token = seconds("mta_inter_token_seconds", "Between two pieces of a streamed answer, a token each.")
        self.tokens = counter("mta_tokens", "Tokens read and written.", "level", "kind")
        self.queue_waiting = gauge("mta_queue_waiting", "Generations that wait for the engine.")
        self.queue_running = gauge("mta_queue_running", "Generations that the engine works on.")
        self.queue_seconds = seconds(
            "mta_queue_seconds", "How long generations waited for the engine, given up ones included."
        )
        self.shed = counter("mta_shed", "Requests turned away, by the reason.", "reason")
        for reason in ("places", "queue_full", "queue_timeout"):
            self.shed.labels(reason)
        self.fallbacks = counter(
            "mta_fallbacks",
            "Generations served by less than the user's own recipe because the engine could not serve it.",
        )
        self.histories_left_out = counter(
            "mta_histories_left_out",
            "Generations without the past items that they wanted, which could not be read in time.",
        )
        self.retries = counter(
            "mta_retries", "Generations sent to the engines a second time, for nothing came of the first."
        )
        self.broken_streams = counter("mta_broken_streams", "Streams that ended in an error event.", "code")
        self.disconnects = counter("mta_disconnects", "Generations whose client left before the end.")
        self.profile_changes = counter("mta_profile_changes", "Profile items added, removed or replaced.")
        self.bank = gauge("mta_bank_info", "The bank served.", "bank")
        self.jobs = gauge("mta_jobs", "About how many adapt jobs of the bank are queued or running.", "state")
        self.oldest_job = gauge("mta_jobs_oldest_seconds", "How long the oldest queued job has waited.")
        self.rewrite_overdue = gauge(
            "mta_rewrite_overdue_seconds",
            "For how long the store's file holds erased users beyond the time that was promised.",
        )
        self.store = StoreSeconds(registry)
        ProcessCollector(registry=registry)

    def watch(self, parts: PartsCollector) -> None:
        """Show what is known of the gateway's parts."""
        self._registry.register(parts)

    def count_refusal(self, reason: str) -> None:
        """Count a request that was turned away."""
        self.shed.labels(reason).inc()

    def count(self, route: str, method: str, status: int, level: str) -> None:
        """Count a request that is over."""
        self.requests.labels(route, method, status, level).inc()

    def count_generation(self, tenant: str, level: str, status: int, *, broken: bool) -> None:
        """Count a generation that is over; one that broke amid its stream has status 200."""
        if broken:
            outcome = "broken"
        elif status < 400:
            outcome = "answered"
        else:
            outcome = _OUTCOMES.get(status) or ("refused" if status < 500 else "failed")
        self.generations.labels(tenant if tenant in self._tenants else OTHER, level, outcome).inc()

    def observe(self, timings_ms: dict[str, float], level: str, usage: dict[str, int]) -> None:
        """Count the stages and the tokens of one generation."""
        for stage, milliseconds in timings_ms.items():
            self.stages.labels(stage).observe(milliseconds / 1000)
        self.tokens.labels(level, "prompt").inc(usage.get("prompt_tokens", 0))
        self.tokens.labels(level, "completion").inc(usage.get("completion_tokens", 0))

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True, eq=False)
class PartsCollector(Collector):
    """What the gateway last saw of its parts, at each scrape; engines are named by their place in the settings."""

    engines: Callable[[], Sequence[EngineFigures | None]]
    readiness: Callable[[], Readiness]  # as `/ready` has it
    memory: Callable[[], Memory | None]  # the store's

    def collect(self) -> Iterator[Metric]:
        ready = self.readiness() is Readiness.READY
        yield GaugeMetricFamily("mta_ready", "Whether requests can be fully served, as /ready says.", float(ready))
        if memory := self.memory():
            yield GaugeMetricFamily("mta_store_used_bytes", "What the store's memory holds.", memory.used_bytes)
            if memory.most_bytes:
                yield GaugeMetricFamily("mta_store_max_bytes", "The most that it may hold.", memory.most_bytes)
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
        for place, figures in enumerate(self.engines()):
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
