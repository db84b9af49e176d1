"""The gateway's metrics and request log. Every label has few values: no users, recipes or paths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.errors import CLIENT_GONE
from server.gateway.engines.admin import Engines
from server.gateway.operating.health import Health, Readiness
from server.observability.audit import room
from server.observability.background import BUCKETS_S, StoreSeconds
from server.store.durability import CheckedStore
from server.store.figures import ServerFigures

log = logging.getLogger("mta.gateway")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"

_GENERATION_PATHS = frozenset(
    ("/generate", "/rewrite", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
)
_METHODS = frozenset(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
Used = Callable[[], Iterable[tuple[str, str, float, int]]]  # tenant, kind of quota, use, and the quota
_OUTCOMES = {429: "limited", CLIENT_GONE: "gone", 503: "unavailable"}


class Metrics:
    """The metrics of one gateway, in a registry of its own; tenants not in `tenants` are labelled `other`.

    What alerts use starts at zero, for each of the `levels` of answers: the first burst is then an increase.
    """

    def __init__(self, tenants: Iterable[str] = (), levels: Iterable[str] = ()) -> None:
        self._registry = registry = CollectorRegistry()
        self._tenants = frozenset(tenants)

        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        seconds = partial(Histogram, buckets=BUCKETS_S, registry=registry)
        of_requests = ("route", "method", "status", "level")
        self.requests = counter("mta_requests", "Requests answered; only generations have a level.", of_requests)
        self.generations = counter(
            "mta_generations",
            "Generations by outcome: answered, refused (4xx), limited (429), unavailable (503), failed (other 5xx), "
            "broken (error within a stream) or gone (client disconnected).",
            ("tenant", "level", "outcome"),
        )
        outcomes = ("answered", "refused", "broken", "failed", *_OUTCOMES.values())
        for labels in product(self._tenants | {OTHER}, ("", *levels), outcomes):
            self.generations.labels(*labels)
        self.stages = seconds("mta_stage_seconds", "Duration of each stage of a generation.", ("stage",))
        self.ttft = seconds("mta_ttft_seconds", "Time from arrival to the first streamed token.", ("level",))
        for level in levels:
            self.ttft.labels(level)
        self.inter_token = seconds("mta_inter_token_seconds", "Time between two tokens of a stream.")
        self.tokens = counter("mta_tokens", "Prompt and completion tokens.", ("level", "kind"))
        self.queue_waiting = gauge("mta_queue_waiting", "Generations that wait for the engines.")
        self.queue_running = gauge("mta_queue_running", "Generations that the engines work on.")
        self.queue_seconds = seconds("mta_queue_seconds", "Queue time of generations, including those that gave up.")
        self.shed = counter("mta_shed", "Requests refused for lack of capacity or by a limit, by reason.", ("reason",))
        for reason in ("places", "queue_full", "queue_timeout"):
            self.shed.labels(reason)
        self.fallbacks = counter("mta_fallbacks", "Generations for which the engine could not serve the user's recipe.")
        self.histories_left_out = counter("mta_histories_left_out", "Generations whose past items loaded too late.")
        self.retries = counter("mta_retries", "Generations sent to the engines again after a failed first attempt.")
        self.broken_streams = counter("mta_broken_streams", "Streams that ended in an error event.", ("code",))
        self.disconnects = counter("mta_disconnects", "Generations whose client disconnected before the end.")
        self.profile_changes = counter("mta_profile_changes", "Profile items added, removed or replaced.")
        self.learned = counter("mta_learned_messages", "Users' messages that became items of their histories.")
        self.unlearned = counter("mta_unlearned_messages", "Messages that were to be learnt and were not.", ("reason",))
        self.bank = gauge("mta_bank_info", "The bank served.", ("bank",))
        self.jobs = gauge("mta_jobs", "Approximate number of adapt jobs, by state: queued or running.", ("state",))
        self.oldest_job = gauge("mta_jobs_oldest_seconds", "How long the next job has waited.")
        self.rewrite_overdue = gauge("mta_rewrite_overdue_seconds", "Delay of removing erased users from the AOF.")
        self.copied = gauge("mta_store_copied_timestamp_seconds", "When the store's newest copy began; 0: none.")
        self.store = StoreSeconds(registry)
        self.store_servers: Sequence[ServerFigures] = ()  # as last reported
        ProcessCollector(registry=registry)

    def watch(self, engines: Engines, health: Health, store: CheckedStore, used: Used) -> None:
        self._registry.register(_PartsCollector(self, engines, health, store, used))

    def count_refusal(self, reason: str) -> None:
        self.shed.labels(reason).inc()

    def count_generation(self, tenant: str, level: str, status: int, *, broken: bool) -> None:
        """Count a finished generation; a `broken` stream has status 200."""
        if broken:
            outcome = "broken"
        elif status < 400:
            outcome = "answered"
        else:
            outcome = _OUTCOMES.get(status) or ("refused" if status < 500 else "failed")
        self.generations.labels(tenant if tenant in self._tenants else OTHER, level, outcome).inc()

    def observe(self, timings_ms: dict[str, float], level: str, usage: dict[str, int]) -> None:
        for stage, milliseconds in timings_ms.items():
            self.stages.labels(stage).observe(milliseconds / 1000)
        self.tokens.labels(level, "prompt").inc(usage.get("prompt_tokens", 0))
        self.tokens.labels(level, "completion").inc(usage.get("completion_tokens", 0))

    def text(self) -> bytes:
        return generate_latest(self._registry)


@dataclass(frozen=True, eq=False)
class _PartsCollector(Collector):
    """Collects the last known state of the parts at each scrape; engines are labelled by position in the settings."""

    metrics: Metrics
    engines: Engines
    health: Health
    store: CheckedStore
    used: Used

    def collect(self) -> Iterator[Metric]:
        ready = self.health.readiness is Readiness.READY
        yield GaugeMetricFamily("mta_ready", "Whether the gateway is ready, as in /ready.", float(ready))
        if memory := self.store.memory:
            yield GaugeMetricFamily("mta_store_used_bytes", "Memory used by the store.", memory.used_bytes)
            if memory.max_bytes:
                yield GaugeMetricFamily("mta_store_max_bytes", "Memory limit of the store.", memory.max_bytes)
        if disk := room():
            yield GaugeMetricFamily("mta_audit_free_bytes", "Free on the disk of the audit log.", disk[0])
            yield GaugeMetricFamily("mta_audit_disk_bytes", "Size of the disk of the audit log.", disk[1])
        labels = ("tenant", "quota")
        used = GaugeMetricFamily("mta_tenant_used", "What a tenant with a quota has used of it.", labels=labels)
        quota = GaugeMetricFamily("mta_tenant_quota", "Quota of a tenant.", labels=labels)
        for tenant, what, amount, most in self.used():
            used.add_metric((tenant, what), amount)
            quota.add_metric((tenant, what), most)
        yield from (used, quota)
        up = GaugeMetricFamily("mta_engine_up", "Whether an engine responds.", labels=("engine",))
        slots = GaugeMetricFamily("mta_engine_slots", "An engine's LoRA slots.", labels=("engine",))
        resident = GaugeMetricFamily("mta_engine_slots_resident", "Slots that hold an adapter.", labels=("engine",))
        prepares = CounterMetricFamily(
            "mta_engine_prepares",
            "Requests that an engine prepared an adapter for: warm if it was in memory, cold if it was fused.",
            labels=("engine", "kind"),
        )
        for position, figures in enumerate(self.engines.figures):
            engine = str(position)
            up.add_metric((engine,), float(figures is not None))
            if figures is None:
                continue
            for family, value in ((slots, figures.slots), (resident, figures.slots_taken)):
                if value is not None:
                    family.add_metric((engine,), value)
            if figures.prepares is not None and figures.fuses is not None:
                prepares.add_metric((engine, "cold"), figures.fuses)
                prepares.add_metric((engine, "warm"), max(0, figures.prepares - figures.fuses))
        yield from (up, slots, resident, prepares, *self._of_servers())

    def _of_servers(self) -> Iterator[Metric]:
        """Yield what the store's servers last reported, by server: the name is empty if there is only one."""
        gauge, counter = partial(GaugeMetricFamily, labels=("server",)), CounterMetricFamily
        families = {
            "used_bytes": gauge("mta_store_server_used_bytes", "Memory used by a server."),
            "resident_bytes": gauge("mta_store_resident_bytes", "A server's memory, as the system counts it."),
            "fork_s": gauge("mta_store_fork_seconds", "How long the last fork stopped a server."),
            "rewrite_s": gauge("mta_store_rewrite_seconds", "How long the last rewrite of the AOF took."),
            "rewrite_failed": gauge("mta_store_rewrite_failed", "Whether the last rewrite of the AOF failed."),
            "replicas": gauge("mta_store_replicas", "Connected replicas."),
        }
        of_commands = ("server", "command")
        calls = counter("mta_store_commands", "Commands that a server ran, by name.", labels=of_commands)
        seconds = counter("mta_store_command_seconds", "Time a server took for them.", labels=of_commands)
        for figures in self.metrics.store_servers:
            for name, family in families.items():
                family.add_metric((figures.server,), float(getattr(figures, name)))
            for command, (times, taken_s) in figures.commands.items():
                calls.add_metric((figures.server, command), times)
                seconds.add_metric((figures.server, command), taken_s)
        yield from (*families.values(), calls, seconds)
