"""How uvicorn serves the gateway, in its own process and in tests."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn

from server.gateway.http.connection import Connection

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.settings import Settings

MAX_HEADER_BYTES = 32 << 10
"""Of a request's line and headers."""
HEADER_TIMEOUT_S = 10.0


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Uvicorn's configuration; sockets are passed to it when it serves."""
    protocol: Any = partial(
        Connection,
        max_header_bytes=MAX_HEADER_BYTES,
        header_timeout_s=HEADER_TIMEOUT_S,
        send_timeout_s=settings.send_timeout_s,
    )
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",  # run around the server: uvicorn would turn its errors into a traceback in the log
        log_config=None,
        access_log=False,  # paths hold user ids
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
    )


class GatewayServer(uvicorn.Server):
    """Uvicorn's server without its signal handlers, which come only when all is open: the caller handles signals."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()
