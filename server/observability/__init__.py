"""Logs, traces and background tasks of a process."""

from __future__ import annotations

from adapters.errors import MtaError
from server.observability.tracing import Tracing
from server.settings import Settings


def open_tracing(settings: Settings, service: str) -> Tracing:
    """Create the tracing that the settings ask for; `service` is the process's name, e.g. `mta-gateway`."""
    if not settings.otlp_endpoint:
        return Tracing()
    try:
        from server.observability.otlp import OtlpTracing

        return OtlpTracing(settings.otlp_endpoint, service, settings.trace_share)
    except ImportError as error:
        raise MtaError(
            f"MTA_OTLP_ENDPOINT is set, but {error.name} is not installed: install mta-server[tracing], or unset it"
        ) from error
