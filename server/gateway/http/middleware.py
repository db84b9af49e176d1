"""Around every request: when it began, one log line, one count, a place. Pure ASGI: streams pass through untouched."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from server.errors import Unavailable
from server.gateway.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("mta.gateway")

_METHODS = frozenset(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
CLIENT_GONE = 499
"""What is counted when the client left before the answer; nobody receives it."""


class RequestLog:
    """Stamps the start time into `scope["state"]`, then logs and counts the answer.

    HEAD is answered as GET is, without the body: the app below sees a GET.

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
        status, headed = 500, False
        is_head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if is_head else scope

        async def watched(message: Message) -> None:
            nonlocal status, headed
            if message["type"] == "http.response.start":
                status = message["status"]
            elif is_head:
                if headed:
                    return
                headed, message = True, {"type": "http.response.body"}  # a stream's end as well: `receive` says so
            await send(message)

        try:
            await self._app(inner, receive, watched)
        finally:
            route = getattr(inner.get("route"), "path", "unmatched")
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


class Places:
    """Serves so many requests at once and tells the others to come back; operations' own are always served.

    Args:
        app: what serves.
        most: requests under way, from their headers to the end of their answers.
    """

    ALWAYS = frozenset(("/health", "/ready", "/metrics"))

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.ALWAYS:
            await self._app(scope, receive, send)
            return
        if self._taken >= self._most:
            error = Unavailable(
                f"{self._most} requests are under way, which is the most at once: try again in a moment",
                code="overloaded",
                retry_after_s=1,
            )
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
            return
        self._taken += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._taken -= 1
