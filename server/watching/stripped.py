"""Spans as they leave a process: with what is known to name nobody, and nothing else.

Instrumentations put into spans whatever they see: paths that hold user ids, queries, addresses of clients, messages of
exceptions. So what may stay is listed here, and the rest goes, whatever a later version of them may add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import Status

_KEPT = frozenset(
    (
        *("http.method", "http.request.method", "http.route", "http.status_code", "http.response.status_code"),
        *("db.system", "db.system.name", "error.type", "exception.type"),
    )
)
_KEPT_OF_CLIENTS = frozenset(
    ("http.url", "url.full", "net.peer.name", "net.peer.port", "server.address", "server.port")
)
"""Of calls to engines and the store, whose URLs hold no one's id."""

_OURS = "mta."


class StrippingExporter(SpanExporter):
    """Strips spans on their way to another exporter.

    Args:
        exporter: sends them.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([stripped(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def stripped(span: ReadableSpan) -> ReadableSpan:
    """The span without what could name a user or quote one."""
    kept = _KEPT | _KEPT_OF_CLIENTS if span.kind is SpanKind.CLIENT else _KEPT
    attributes = _only(kept, span.attributes)
    return ReadableSpan(
        name=_route(attributes) if span.kind is SpanKind.SERVER else span.name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes=attributes,
        events=[Event(event.name, _only(_KEPT, event.attributes), event.timestamp) for event in span.events],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),  # without its description, which is an exception's message
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _only(kept: frozenset[str], attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (attributes or {}).items() if name in kept or name.startswith(_OURS)}


def _route(attributes: Mapping[str, Any]) -> str:
    """The name of a request's span, whose own may be a path."""
    method = attributes.get("http.request.method") or attributes.get("http.method") or "HTTP"
    return f"{method} {attributes.get('http.route', 'unmatched')}"
