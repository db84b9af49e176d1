"""Around every request: its start time, a log line and a count. Pure ASGI: streams pass through untouched."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from server.watching.logs import request_id, traceparent

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from server.watching.tracing import Tracing

log = logging.getLogger("mta.gateway")

CLIENT_GONE = 499
"""The status that is counted when the client left before the answer; it is never sent."""

_METHODS = frozenset(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))


@dataclass(slots=True)
class RequestNotes:
    """What the log and the count say about a request besides its route; what answers it fills them in.

    Attributes:
        started_s: when it arrived, by the performance counter.
        answer_id: of a generation; it is in the engine's logs too.
        level: how personal a generation is.
        gone: whether the client left before the answer.
        broken: whether a stream ended in an error.
        generating: whether an engine is at work for it: then a client that takes nothing is soon hung up on.
    """

    started_s: float
    answer_id: str = ""
    level: str = ""
    gone: bool = False
    broken: bool = False
    generating: bool = False


def notes_of(scope: Scope) -> RequestNotes:
    """The notes on a request that `RequestLog` let in."""
    notes: RequestNotes = scope["state"]["notes"]
    return notes


class Counts(Protocol):
    """What counts requests that are over; see `server/gateway/operating/metrics.py`."""

    def count(self, route: str, method: str, status: int, level: str) -> None: ...

    def count_generation(self, tenant: str, level: str, status: int, *, broken: bool) -> None: ...


class RequestLog:
    """Begins the notes on a request, then logs and counts the answer.

    HEAD is answered as GET is, without the body: the app below sees a GET.

    Neither path nor body is logged: both name people. Only the route is. Answers carry the request's id, which is the
    end of a generation's, so that a client's report leads to the lines on it.
    """

    def __init__(self, app: ASGIApp, counts: Counts, generating: frozenset[str], tracing: Tracing) -> None:
        self._app = app
        self._counts = counts
        self._generating = generating
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes, own_id = RequestNotes(time.perf_counter()), secrets.token_hex(12)
        request_id.set(own_id)
        traceparent.set(self._tracing.current())
        self._tracing.note(request=own_id)
        scope.setdefault("state", {})["notes"] = notes
        status, headed = 500, False
        is_head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if is_head else scope

        async def watched(message: Message) -> None:
            nonlocal status, headed
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", own_id.encode())]
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
            status = CLIENT_GONE if notes.gone else status
            self._counts.count(route, method, status, notes.level)
            if method == "POST" and scope["path"] in self._generating:
                tenant = getattr(inner["state"].get("caller"), "tenant", "")  # as the gates noted it, if they did
                self._counts.count_generation(tenant, notes.level, status, broken=notes.broken)
            took_ms = round((time.perf_counter() - notes.started_s) * 1000, 1)
            log.info(
                "%s %s %d %s ms%s%s",
                method,
                route,
                status,
                took_ms,
                f" {notes.answer_id}" if notes.answer_id else "",
                f" {notes.level}" if notes.level else "",
                extra={"fields": {"method": method, "route": route, "status": status, "ms": took_ms}},
            )
