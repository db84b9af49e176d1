"""What the gateway counts, and the log line of each request. Every label has few values: no user, no recipe, no path.

A tenant is a label only where the settings name it; all others together are `other`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.gateway.engines.admin import Engines
from server.gateway.http.streaming import CLIENT_GONE
from server.gateway.operating.health import Health, Readiness
from server.store.durability import CheckedStore
from server.watching.background import BUCKETS_S, StoreSeconds
from server.watching.logs import request_id, traceparent

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from server.watching.tracing import Tracing

log = logging.getLogger("mta.gateway")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"

_GENERATING = frozenset(("/generate", "/v1/chat/completions", "/v1/completions"))
"""The paths whose POSTs are generations."""
_METHODS = frozenset(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
_OUTCOMES = {429: "limited", CLIENT_GONE: "gone", 503: "unavailable"}


class Metrics:
    """The metrics of one gateway, in a registry of its own; labels name these `tenants` alone."""

    def __init__(self, tenants: Iterable[str] = ()) -> None:
        self._registry = registry = CollectorRegistry()
        self._tenants = frozenset(tenants)

        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        seconds = partial(Histogram, buckets=BUCKETS_S, registry=registry)
        of_requests = ("route", "method", "status", "level")
        self.requests = counter("mta_requests", "Requests answered; level is set for generations.", of_requests)
        self.generations = counter(
            "mta_generations",
            "Generations by how they ended: answered, refused (4xx), limited (429), unavailable (503), failed (other "
            "5xx), broken (an error amid a stream) or gone (the client left).",
            ("tenant", "level", "outcome"),
        )
        for tenant in self._tenants | {OTHER}:
            for outcome in ("refused", "limited", "unavailable", "failed"):
                self.generations.labels(tenant, "", outcome)  # from zero on: a first failure is an increase
        self.stages = seconds("mta_stage_seconds", "Where generations spent their time.", ("stage",))
        self.ttft = seconds("mta_ttft_seconds", "From a request's arrival to its first streamed token.", ("level",))
        self.inter_token = seconds("mta_inter_token_seconds", "Between two pieces of a streamed answer, a token each.")
        self.tokens = counter("mta_tokens", "Tokens read and written.", ("level", "kind"))
        self.queue_waiting = gauge("mta_queue_waiting", "Generations that wait for the engine.")
        self.queue_running = gauge("mta_queue_running", "Generations that the engine works on.")
        self.queue_seconds = seconds("mta_queue_seconds", "How long generations waited, given up ones included.")
        self.shed = counter("mta_shed", "Requests turned away, by the reason.", ("reason",))
        for reason in ("places", "queue_full", "queue_timeout"):
            self.shed.labels(reason)
        self.fallbacks = counter("mta_fallbacks", "Generations for which the engine could not serve the user's recipe.")
        self.histories_left_out = counter("mta_histories_left_out", "Generations whose past items came too late.")
        self.retries = counter("mta_retries", "Generations sent to the engines again, for nothing came of the first.")
        self.broken_streams = counter("mta_broken_streams", "Streams that ended in an error event.", ("code",))
        self.disconnects = counter("mta_disconnects", "Generations whose client left before the end.")
        self.profile_changes = counter("mta_profile_changes", "Profile items added, removed or replaced.")
        self.bank = gauge("mta_bank_info", "The bank served.", ("bank",))
        self.jobs = gauge("mta_jobs", "About how many adapt jobs of the bank are queued or running.", ("state",))
        self.oldest_job = gauge("mta_jobs_oldest_seconds", "How long the oldest queued job has waited.")
        self.rewrite_overdue = gauge("mta_rewrite_overdue_seconds", "How late erased users leave the store's file.")
        self.store = StoreSeconds(registry)
        ProcessCollector(registry=registry)

    def watch(self, engines: Engines, health: Health, store: CheckedStore) -> None:
        """Show what is known of the gateway's parts."""
        self._registry.register(_PartsCollector(engines, health, store))

    def count_refusal(self, reason: str) -> None:
        """Count a request that was turned away."""
        self.shed.labels(reason).inc()

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
        return generate_latest(self._registry)


@dataclass(frozen=True, eq=False)
class _PartsCollector(Collector):
    """What the gateway last saw of its parts, at each scrape; engines are named by their place in the settings."""

    engines: Engines
    health: Health
    store: CheckedStore

    def collect(self) -> Iterator[Metric]:
        ready = self.health.readiness is Readiness.READY
        yield GaugeMetricFamily("mta_ready", "Whether requests can be fully served, as /ready says.", float(ready))
        if memory := self.store.memory:
            yield GaugeMetricFamily("mta_store_used_bytes", "What the store's memory holds.", memory.used_bytes)
            if memory.max_bytes:
                yield GaugeMetricFamily("mta_store_max_bytes", "The most that it may hold.", memory.max_bytes)
        up = GaugeMetricFamily("mta_engine_up", "Whether an engine answers.", labels=("engine",))
        slots = GaugeMetricFamily("mta_engine_slots", "An engine's LoRA slots.", labels=("engine",))
        resident = GaugeMetricFamily("mta_engine_slots_resident", "Slots that hold an adapter.", labels=("engine",))
        prepares = CounterMetricFamily(
            "mta_engine_prepares",
            "Requests that an engine prepared an adapter for: warm ones found it there, cold ones had it fused.",
            labels=("engine", "kind"),
        )
        for place, figures in enumerate(self.engines.figures):
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


@dataclass(slots=True)
class RequestNotes:
    """What the log and the count say about a request besides its route; what answers it fills them in."""

    started_s: float  # when it arrived, by the performance counter
    answer_id: str = ""  # of a generation; it is in the engine's logs too
    level: str = ""  # how personal a generation is
    gone: bool = False  # the client left before the answer
    broken: bool = False  # a stream ended in an error
    generating: bool = False  # an engine is at work: then a client that takes nothing is soon hung up on


def notes_of(scope: Scope) -> RequestNotes:
    """The notes on a request that `RequestLog` let in."""
    notes: RequestNotes = scope["state"]["notes"]
    return notes


class RequestLog:
    """Middleware that begins the notes on a request, then logs and counts the answer; streams pass through untouched.

    HEAD is answered as GET is, without the body: the app below sees a GET. Neither path nor body is logged: both name
    people. Answers carry the request's id, so that a client's report leads to the lines on it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes, own_id = RequestNotes(time.perf_counter()), secrets.token_hex(12)
        request_id.set(own_id)
        traceparent.set(self._tracing.current())
        self._tracing.note(request=own_id)
        scope.setdefault("state", {})["notes"] = notes
        status, headed = 500, False
        is_head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if is_head else scope

        async def watched(message: Message) -> None:
            nonlocal status, headed
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", own_id.encode())]
            elif is_head:
                if headed:
                    return
                headed, message = True, {"type": "http.response.body"}  # a stream's end as well: `receive` says so
            await send(message)

        try:
            await self._app(inner, receive, watched)
        finally:
            route = getattr(inner.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            status = CLIENT_GONE if notes.gone else status
            self._metrics.requests.labels(route, method, status, notes.level).inc()
            if method == "POST" and scope["path"] in _GENERATING:
                tenant = getattr(inner["state"].get("caller"), "tenant", "")  # as the gates noted it, if they did
                self._metrics.count_generation(tenant, notes.level, status, broken=notes.broken)
            took_ms = round((time.perf_counter() - notes.started_s) * 1000, 1)
            log.info(
                "%s %s %d %s ms%s%s",
                method,
                route,
                status,
                took_ms,
                f" {notes.answer_id}" if notes.answer_id else "",
                f" {notes.level}" if notes.level else "",
                extra={"fields": {"method": method, "route": route, "status": status, "ms": took_ms}},
            )
