"""Parts of traces, by OpenTelemetry's interface: what a process adds, whoever has set up where it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.watching.tracing import Tracing

W3C = TraceContextTextMapPropagator()


class SpanTracing(Tracing):
    """Adds spans.

    Args:
        provider: what makes them; the process's own by default.
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("mta", tracer_provider=provider)

    def current(self) -> str:
        carrier: dict[str, str] = {}
        W3C.inject(carrier)
        return carrier.get("traceparent", "")

    @contextmanager
    def span(self, name: str, *, follows: str = "") -> Iterator[None]:
        context = W3C.extract({"traceparent": follows}) if follows else None
        # Errors name what they are about, which no span may.
        with self._tracer.start_as_current_span(name, context, record_exception=False, set_status_on_exception=False):
            yield

    def note(self, **attributes: str | int | float) -> None:
        trace.get_current_span().set_attributes({f"mta.{name}": value for name, value in attributes.items()})

    def link(self, traceparent: str) -> None:
        other = trace.get_current_span(W3C.extract({"traceparent": traceparent})).get_span_context()
        if other.is_valid:
            trace.get_current_span().add_link(other)
