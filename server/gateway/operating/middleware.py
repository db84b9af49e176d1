"""What surrounds every request: its log line and metrics, the audit log, and HEAD. None of these buffers streams."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import CLIENT_GONE, Unavailable
from server.gateway.http.errors import error_response
from server.gateway.operating.metrics import Metrics
from server.observability.audit import Act, note
from server.observability.logs import request_id, traceparent
from server.observability.tracing import Tracing

log = logging.getLogger("mta.gateway")

_GENERATION_PATHS = frozenset(
    ("/generate", "/rewrite", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
)
_METHODS = frozenset(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))


@dataclass(slots=True)
class RequestNotes:
    """What log and metrics report about a request besides its route; filled in by the code that answers it."""

    started_s: float  # time of arrival, by the performance counter
    answer_id: str = ""  # id of the generation, also in the engine's logs
    level: str = ""  # personalization level of the generation
    gone: bool = False  # the client disconnected before the response
    broken: bool = False  # the stream ended in an error
    audited: tuple[Act, str] | None = None  # what the request does to which user key, for the audit log
    generating: bool = False  # an engine is working, so a client that stops reading is disconnected soon


def notes_of(scope: Scope) -> RequestNotes:
    notes: RequestNotes = scope["state"]["notes"]
    return notes


class RequestLog:
    """Creates a request's notes, and logs and counts the response, which carries the request's id.

    Neither path nor body are logged, because both can identify people.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes, own_id, method = RequestNotes(time.perf_counter()), secrets.token_hex(12), scope["method"]
        request_id.set(own_id)
        traceparent.set(self._tracing.current())
        self._tracing.note(request=own_id)
        scope.setdefault("state", {})["notes"] = notes
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", own_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # a stopping gateway waits no longer
            if status:
                raise
            error = Unavailable("this gateway has stopped: try again", code="stopping", retry_after_s=1)
            await error_response(error)(scope, receive, send_with_id)
        finally:
            self._note(scope, method, CLIENT_GONE if notes.gone else status or 500)

    def _note(self, scope: Scope, method: str, status: int) -> None:
        notes, route = notes_of(scope), getattr(scope.get("route"), "path", "unmatched")
        method = method if method in _METHODS else "OTHER"
        tenant, key = _caller(scope["state"])
        self._metrics.requests.labels(route, method, status, notes.level).inc()
        if method == "POST" and scope["path"] in _GENERATION_PATHS:
            self._metrics.count_generation(tenant, notes.level, status, broken=notes.broken)
        took_ms = round((time.perf_counter() - notes.started_s) * 1000, 1)
        by = {"tenant": tenant, "key": key} if key else {}
        told = (f"{method} {route} {status} {took_ms} ms", notes.answer_id, notes.level, *map("=".join, by.items()))
        fields = {"method": method, "route": route, "status": status, "ms": took_ms} | by
        log.info(" ".join(filter(None, told)), extra={"fields": fields})


class AuditLog:
    """Adds requests that are to be audited to the audit log, before their client can know the outcome.

    A request whose outcome cannot be audited gets the error instead.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, is_refused = 500, False

        async def audited_send(message: Message) -> None:
            nonlocal status, is_refused
            if is_refused:
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                try:
                    await _audit(scope["state"], status)
                except Unavailable as error:
                    is_refused = True
                    await error_response(error)(scope, receive, send)
                    return
            await send(message)

        try:
            await self._app(scope, receive, audited_send)
        finally:
            await _audit(scope["state"], CLIENT_GONE if notes_of(scope).gone else status)


class HeadRequests:
    """Answers HEAD as GET without the body; streams end too, since `receive` reports a disconnect from then on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        is_ended = False

        async def send_head(message: Message) -> None:
            nonlocal is_ended
            if message["type"] == "http.response.start":
                await send(message)
            elif not is_ended:
                is_ended = True
                await send({"type": "http.response.body"})

        inner = {**scope, "method": "GET"}  # the server goes by its own scope, and expects no body
        try:
            await self._app(inner, receive, send_head)
        finally:
            scope["route"] = inner.get("route")


def _caller(state: Mapping[str, Any]) -> tuple[str, str]:
    """Return tenant and key of a request's caller, empty if there is none."""
    caller = state.get("caller")
    return getattr(caller, "tenant", ""), getattr(caller, "key_id", "")


async def _audit(state: Mapping[str, Any], status: int) -> None:
    """Add a request that is to be audited to the audit log, once."""
    if audited := state["notes"].audited:
        state["notes"].audited = None
        (act, user_key), (tenant, key) = audited, _caller(state)
        await asyncio.to_thread(note, act, status, tenant=tenant, key=key, user=user_key)
