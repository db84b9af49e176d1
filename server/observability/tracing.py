"""Tracing: without a collector nothing is traced, and OpenTelemetry is not imported."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

TRACES_PATH = "/v1/traces"  # at which collectors accept spans by OTLP over HTTP


class Tracing:
    """Traces nothing; the implementations in `otlp.py` do."""

    def watch_app(self, app: FastAPI) -> None:
        """Trace requests to an application, except health checks and pages."""

    def session_options(self) -> dict[str, Any]:
        """Return the options for an aiohttp session whose requests are traced and propagate the trace."""
        return {}

    def current(self) -> str:
        """Return the current W3C traceparent, which headers and job records carry; empty outside a trace."""
        return ""

    def span(self, name: str, *, follows: str = "") -> AbstractContextManager[None]:
        """Open a span in the current trace, or in the trace of the traceparent `follows`."""
        return nullcontext()

    def note(self, **attributes: str | int | float) -> None:
        """Add attributes to the current span; never pass user ids or text that users wrote."""

    def link(self, traceparent: str) -> None:
        """Link the current span to the span in another trace that caused it."""

    def close(self) -> None:
        """Send all pending spans."""
