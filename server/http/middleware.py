"""Around every request: when it began, one log line, one count. Pure ASGI, so that streams pass through untouched."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from server.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("mta.gateway")

_METHODS = frozenset(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
CLIENT_GONE = 499
"""What is counted when the client left before the answer; nobody receives it."""


class RequestLog:
    """Stamps the start time into `scope["state"]`, then logs and counts the answer.

    Neither the path nor a body is logged: both name people. What is logged of a request is its route.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        state = scope.setdefault("state", {})
        state["started_s"] = started_s
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            level = state.get("level", "")
            status = CLIENT_GONE if state.get("gone") else status
            self._metrics.requests.labels(route, method, status, level).inc()
            log.info(
                "%s %s %d %.1f ms%s%s",
                method,
                route,
                status,
                (time.perf_counter() - started_s) * 1000,
                f" {state['request_id']}" if "request_id" in state else "",
                f" {level}" if level else "",
            )
