"""Traces by OpenTelemetry, sent to a collector by OTLP over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.aiohttp_client import create_trace_config
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.watching.stripped import StrippingExporter
from server.watching.tracing import Tracing

if TYPE_CHECKING:
    from fastapi import FastAPI

TRACES = "/v1/traces"
"""Where collectors take spans."""

_EXPORT_TIMEOUT_S = 5
_NOT_TRACED = r"^https?://[^/]+/(health|ready|metrics|docs|openapi\.json|console.*)$"
_W3C = TraceContextTextMapPropagator()


class Requests(Sampler):
    """Traces begin with requests and jobs, not with what a process does by itself, such as looking at its parts.

    Args:
        share: of those that nobody has decided about yet.
    """

    def __init__(self, share: float) -> None:
        self._begun = TraceIdRatioBased(share)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: Any = None,
    ) -> SamplingResult:
        parent = trace.get_current_span(parent_context).get_span_context()
        if parent.is_valid:
            return SamplingResult(Decision.RECORD_AND_SAMPLE if parent.trace_flags.sampled else Decision.DROP)
        if kind is SpanKind.SERVER:
            return self._begun.should_sample(parent_context, trace_id, name, kind)
        return SamplingResult(Decision.DROP)

    def get_description(self) -> str:
        return f"Requests({self._begun.rate:g})"


class OtlpTracing(Tracing):
    """Traces by OpenTelemetry.

    Args:
        endpoint: the collector's base URL.
        service: what the process is.
        share: of requests that are traced.
    """

    def __init__(self, endpoint: str, service: str, share: float) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), sampler=Requests(share), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(StrippingExporter(exporter)))
        self._tracer = self._provider.get_tracer("mta")
        propagate.set_global_textmap(_W3C)  # and no baggage: what clients put there is nobody's business
        RedisInstrumentor().instrument(tracer_provider=self._provider)

    def watch_app(self, app: FastAPI) -> None:
        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=self._provider,
            excluded_urls=_NOT_TRACED,
            exclude_spans=["receive", "send"],  # a span for every piece of a stream
        )

    def session_options(self) -> dict[str, Any]:
        return {"trace_configs": [create_trace_config(tracer_provider=self._provider)]}

    def current(self) -> str:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier.get("traceparent", "")

    @contextmanager
    def span(self, name: str, *, follows: str = "") -> Iterator[None]:
        context = _W3C.extract({"traceparent": follows}) if follows else None
        with self._tracer.start_as_current_span(name, context):
            yield

    def note(self, **attributes: str | int | float) -> None:
        trace.get_current_span().set_attributes({f"mta.{name}": value for name, value in attributes.items()})

    def link(self, traceparent: str) -> None:
        other = trace.get_current_span(_W3C.extract({"traceparent": traceparent})).get_span_context()
        if other.is_valid:
            trace.get_current_span().add_link(other)

    def close(self) -> None:
        RedisInstrumentor().uninstrument()
        self._provider.shutdown()


