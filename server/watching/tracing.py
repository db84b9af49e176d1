"""Tracing: without a collector nothing is traced, and OpenTelemetry is not imported."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from adapters.errors import MtaError
from server.settings import Settings

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


def open_tracing(settings: Settings, service: str) -> Tracing:
    """Create the tracing that the settings ask for; `service` is the process's name, e.g. `mta-gateway`."""
    if not settings.otlp_endpoint:
        return Tracing()
    try:
        from server.watching.otlp import OtlpTracing

        return OtlpTracing(settings.otlp_endpoint, service, settings.trace_share)
    except ImportError as error:
        raise MtaError(
            f"MTA_OTLP_ENDPOINT is set, but {error.name} is not installed: install mta-server[tracing], or unset it"
        ) from error
