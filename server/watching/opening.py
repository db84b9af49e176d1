"""Which of all tracings a process has: nothing that traces is imported unless it is wanted."""

from __future__ import annotations

from adapters.errors import MtaError
from server.settings import Settings
from server.watching.tracing import Tracing


def open_tracing(settings: Settings, service: str) -> Tracing:
    """What traces this process, as the settings say.

    Args:
        settings: the process's.
        service: what the process is, e.g. `mta-gateway`.

    Raises:
        MtaError: when traces are wanted and the packages for them are missing.
    """
    if not settings.otlp_endpoint:
        return Tracing()
    try:
        from server.watching.otlp import OtlpTracing
    except ImportError as error:
        raise MtaError(
            f"MTA_OTLP_ENDPOINT is set, but {error.name} is not installed: install mta-server[tracing], or unset it"
        ) from error
    return OtlpTracing(settings.otlp_endpoint, service, settings.trace_share)
