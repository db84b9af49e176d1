"""OpenTelemetry traces, sent to a collector by OTLP over HTTP.

Instrumentations put personal data into spans: paths with user ids, queries, client addresses, exception messages. So
only the attributes on an allow list leave the process, whatever a later version of an instrumentation adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.trace.status import Status

from server.observability.tracing import TRACES_PATH, Tracing

if TYPE_CHECKING:
    from fastapi import FastAPI

_W3C = TraceContextTextMapPropagator()

_EXPORT_TIMEOUT_S = 2  # also limits how long an unresponsive collector delays shutdown
_NOT_TRACED = r"^https?://[^/]+/(health|ready|metrics|docs|openapi\.json|console.*)$"
_OWN_PREFIX = "mta."
_ALLOWED = {
    *("http.method", "http.request.method", "http.route", "http.status_code", "http.response.status_code"),
    *("db.system", "db.system.name", "error.type", "exception.type"),
}
# Also allowed in client spans: URLs of engines and the store contain no user ids.
_ADDRESSES = {"http.url", "url.full", "net.peer.name", "net.peer.port", "server.address", "server.port"}


class SpanTracing(Tracing):
    """Adds spans to `provider`, by default the global one, which vLLM sets up in an engine."""

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("mta", tracer_provider=provider)

    def current(self) -> str:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier.get("traceparent", "")

    @contextmanager
    def span(self, name: str, *, follows: str = "") -> Iterator[None]:
        context = _W3C.extract({"traceparent": follows}) if follows else None
        # Error messages can contain user data, which must not get into spans.
        with self._tracer.start_as_current_span(name, context, record_exception=False, set_status_on_exception=False):
            yield

    def note(self, **attributes: str | int | float) -> None:
        trace.get_current_span().set_attributes({f"{_OWN_PREFIX}{name}": value for name, value in attributes.items()})

    def link(self, traceparent: str) -> None:
        other = trace.get_current_span(_W3C.extract({"traceparent": traceparent})).get_span_context()
        if other.is_valid:
            trace.get_current_span().add_link(other)


class OtlpTracing(SpanTracing):
    """Traces a share of requests with their engine calls, store commands and the process's own spans."""

    def __init__(self, endpoint: str, service: str, fraction: float) -> None:
        # Imported here because engines, which use vLLM's spans, may not have these packages.
        from opentelemetry.instrumentation.aiohttp_client import create_trace_config
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.instrumentation.redis import RedisInstrumentor

        self._requests, self._calls, self._commands = FastAPIInstrumentor, create_trace_config, RedisInstrumentor()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}),
            sampler=ParentBased(_RequestSampler(fraction)),
            shutdown_on_exit=False,
        )
        exporter = _StrippingExporter(endpoint=endpoint.rstrip("/") + TRACES_PATH, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        super().__init__(self._provider)
        propagate.set_global_textmap(_W3C)  # without baggage: do not pass on what clients put there
        self._commands.instrument(tracer_provider=self._provider)

    def watch_app(self, app: FastAPI) -> None:
        self._requests.instrument_app(
            app,
            tracer_provider=self._provider,
            excluded_urls=_NOT_TRACED,
            exclude_spans=["receive", "send"],  # one span per chunk of a stream
        )

    def session_options(self) -> dict[str, Any]:
        return {"trace_configs": [self._calls(tracer_provider=self._provider)]}

    def close(self) -> None:
        self._commands.uninstrument()
        self._provider.shutdown()


class _RequestSampler(TraceIdRatioBased):
    """Starts traces only at requests, not at background work such as health probes."""

    def should_sample(self, *given: Any, **named: Any) -> SamplingResult:
        if named["kind"] is not SpanKind.SERVER:  # `ParentBased` passes keyword arguments
            return SamplingResult(Decision.DROP)
        return super().should_sample(*given, **named)


class _StrippingExporter(OTLPSpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return super().export([_stripped(span) for span in spans])


def _stripped(span: ReadableSpan) -> ReadableSpan:
    """Return a copy of the span without anything that could identify or quote a user."""
    attributes = _filtered(_ALLOWED | _ADDRESSES if span.kind is SpanKind.CLIENT else _ALLOWED, span.attributes)
    name = span.name
    if span.kind is SpanKind.SERVER:  # the original name may be a path
        method = attributes.get("http.request.method") or attributes.get("http.method") or "HTTP"
        name = f"{method} {attributes.get('http.route', 'unmatched')}"
    return ReadableSpan(
        name=name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes=attributes,
        events=[Event(event.name, _filtered(_ALLOWED, event.attributes), event.timestamp) for event in span.events],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),  # without the description, which is an exception message
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _filtered(allowed: set[str], attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (attributes or {}).items() if key in allowed or key.startswith(_OWN_PREFIX)}
