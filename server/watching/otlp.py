"""Traces by OpenTelemetry, sent to a collector by OTLP over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
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

from server.watching.spans import W3C, SpanTracing
from server.watching.stripped import StrippingExporter
from server.watching.tracing import TRACES_PATH

if TYPE_CHECKING:
    from fastapi import FastAPI

_EXPORT_TIMEOUT_S = 2
"""What a process waits for a silent collector, also when it ends."""

_NOT_TRACED = r"^https?://[^/]+/(health|ready|metrics|docs|openapi\.json|console.*)$"


class Requests(Sampler):
    """Traces begin with requests and jobs, not with what a process does by itself, such as looking at its parts.

    Args:
        share: of those that nobody has decided about yet.
    """

    def __init__(self, share: float) -> None:
        self._begun = TraceIdRatioBased(share)

    def should_sample(  # noqa: PLR0917  OpenTelemetry's signature
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


class OtlpTracing(SpanTracing):
    """Traces requests, calls to engines, the store's commands, and what the process adds.

    Args:
        endpoint: the collector's base URL.
        service: what the process is.
        share: of requests that are traced.
    """

    def __init__(self, endpoint: str, service: str, share: float) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), sampler=Requests(share), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES_PATH, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(StrippingExporter(exporter)))
        super().__init__(self._provider)
        propagate.set_global_textmap(W3C)  # and no baggage: what clients put there is nobody's business
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

    def close(self) -> None:
        RedisInstrumentor().uninstrument()
        self._provider.shutdown()
