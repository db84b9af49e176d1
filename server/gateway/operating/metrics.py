"""What the gateway counts. Every label has a fixed, small set of values: no user, no recipe, no path.

A tenant is a label only where the settings name it; all others together are `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from server.gateway.engines.admin import EngineFigures
from server.gateway.operating.health import Readiness
from server.gateway.operating.seen import SeenParts
from server.store.durability import Memory
from server.watching.figures import BUCKETS_S, StoreSeconds

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"

GENERATING = frozenset(("/generate", "/v1/chat/completions", "/v1/completions"))
"""The paths whose POSTs are generations."""

_OUTCOMES = {429: "limited", 499: "gone", 503: "unavailable"}


class Metrics:
    """The metrics of one gateway, in a registry of its own.

    Args:
        tenants: those that labels name.
    """

    def __init__(self, tenants: Iterable[str] = ()) -> None:
        self._registry = registry = CollectorRegistry()
        self._tenants = frozenset(tenants)
        self.requests = Counter(
            "mta_requests",
            "Requests answered; level is set for generations.",
            ("route", "method", "status", "level"),
            registry=registry,
        )
        self.generations = Counter(
            "mta_generations",
            "Generations by how they ended: answered, refused (4xx), limited (429), unavailable (503), failed (other "
            "5xx), broken (an error amid a stream) or gone (the client left).",
            ("tenant", "level", "outcome"),
            registry=registry,
        )
        for tenant in self._tenants | {OTHER}:
            for outcome in ("refused", "limited", "unavailable", "failed"):
                self.generations.labels(tenant, "", outcome)  # from zero on: a first failure is an increase
        self.stages = Histogram(
            "mta_stage_seconds",
            "Where generations spent their time.",
            ("stage",),
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.ttft = Histogram(
            "mta_ttft_seconds",
            "From the arrival of a request to its first token, where the engine streams.",
            ("level",),
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "mta_inter_token_seconds",
            "Between two pieces of a streamed answer, a token each.",
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.tokens = Counter("mta_tokens", "Tokens read and written.", ("level", "kind"), registry=registry)
        self.queue_waiting = Gauge("mta_queue_waiting", "Generations that wait for the engine.", registry=registry)
        self.queue_running = Gauge("mta_queue_running", "Generations that the engine works on.", registry=registry)
        self.queue_seconds = Histogram(
            "mta_queue_seconds",
            "How long generations waited for the engine, given up ones included.",
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.shed = Counter(
            "mta_shed",
            "Requests turned away, by the reason.",
            ("reason",),
            registry=registry,
        )
        for reason in ("places", "queue_full", "queue_timeout"):
            self.shed.labels(reason)
        self.fallbacks = Counter(
            "mta_fallbacks",
            "Generations served by less than the user's own recipe because the engine could not serve it.",
            registry=registry,
        )
        self.histories_left_out = Counter(
            "mta_histories_left_out",
            "Generations without the past items that they wanted, which could not be read in time.",
            registry=registry,
        )
        self.retries = Counter(
            "mta_retries",
            "Generations sent to the engines a second time, for nothing came of the first.",
            registry=registry,
        )
        self.broken_streams = Counter(
            "mta_broken_streams", "Streams that ended in an error event.", ("code",), registry=registry
        )
        self.disconnects = Counter(
            "mta_disconnects", "Generations whose client left before the end.", registry=registry
        )
        self.profile_changes = Counter(
            "mta_profile_changes", "Profile items added, removed or replaced.", registry=registry
        )
        self.bank = Gauge("mta_bank_info", "The bank served.", ("bank",), registry=registry)
        self.jobs = Gauge(
            "mta_jobs",
            "About how many adapt jobs of the bank are queued or running.",
            ("state",),
            registry=registry,
        )
        self.oldest_job = Gauge(
            "mta_jobs_oldest_seconds",
            "How long the oldest queued job has waited.",
            registry=registry,
        )
        self.rewrite_overdue = Gauge(
            "mta_rewrite_overdue_seconds",
            "For how long the store's file holds erased users beyond the time that was promised.",
            registry=registry,
        )
        self.store = StoreSeconds(registry)
        ProcessCollector(registry=registry)

    def watch(
        self,
        engines: Callable[[], Sequence[EngineFigures | None]],
        readiness: Callable[[], Readiness],
        memory: Callable[[], Memory | None],
    ) -> None:
        """Show what is known of the other parts, as it is known whenever somebody asks."""
        self._registry.register(SeenParts(engines, readiness, memory))

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
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)
