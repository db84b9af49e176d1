"""What a process traces. Without a collector: nothing, by code that imports nothing.

A trace is named by W3C's `traceparent`, which travels in headers and in the records of jobs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from adapters.errors import MtaError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.settings import Settings

TRACES_PATH = "/v1/traces"
"""Where collectors take spans, by OTLP over HTTP."""


class Tracing:
    """Traces nothing; `otlp.py` has those that do."""

    def watch_app(self, app: FastAPI) -> None:
        """Trace requests to an application, but for health checks and pages."""

    def session_options(self) -> dict[str, Any]:
        """For an aiohttp session whose requests are traced, and carry the trace on."""
        return {}

    def current(self) -> str:
        """The current traceparent; empty outside of any trace."""
        return ""

    def span(self, name: str, *, follows: str = "") -> AbstractContextManager[None]:
        """A span of the current trace, or of that of the traceparent `follows`."""
        return nullcontext()

    def note(self, **attributes: str | int | float) -> None:
        """Add attributes to the current span. Never ids of users, or anything that they wrote."""

    def link(self, traceparent: str) -> None:
        """Link the current span to the one in another trace that led to it."""

    def close(self) -> None:
        """Send what was not sent yet."""


def open_tracing(settings: Settings, service: str) -> Tracing:
    """The process's tracing, as the settings say; `service` names the process, e.g. `mta-gateway`."""
    if not settings.otlp_endpoint:
        return Tracing()
    try:
        from server.watching.otlp import OtlpTracing

        return OtlpTracing(settings.otlp_endpoint, service, settings.trace_share)
    except ImportError as error:
        raise MtaError(
            f"MTA_OTLP_ENDPOINT is set, but {error.name} is not installed: install mta-server[tracing], or unset it"
        ) from error
