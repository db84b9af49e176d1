"""What each route requires and counts against, and the first two of a request's three gates, before its body is read.

They are the caller's share of all requests (`shares.py`), the key's limits (`limiter.py`) and the queue (`queue.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from server.errors import Forbidden, TooMany, Unavailable
from server.gateway.access.keys import Caller, KnownKeys, caller_name_of, caller_of
from server.gateway.access.limiter import RequestUsage
from server.gateway.access.shares import Shares
from server.store.tenants.access_keys import CREATE, Scope

OPEN = None  # marks a route that requires no key: it reveals nothing about users or about this deployment


class RouteKind(StrEnum):
    """What a request counts against."""

    OPERATION = "operation"  # nothing: operators are always served
    UNLIMITED = "unlimited"  # a place, but no rate limit: erasing must always work, and open routes have no key
    REQUEST = "request"  # a place and the key's request limit
    EVENTS = "events"  # like REQUEST, plus one of a quarter of all places: an event stream may stay open for hours
    GENERATION = "generation"  # like REQUEST, plus the token limits


ROUTES: Mapping[str, tuple[Scope | None, RouteKind]] = {
    "POST /generate": (Scope.GENERATE, RouteKind.GENERATION),
    "POST /rewrite": (Scope.GENERATE, RouteKind.GENERATION),
    "POST /v1/chat/completions": (Scope.GENERATE, RouteKind.GENERATION),
    "POST /v1/completions": (Scope.GENERATE, RouteKind.GENERATION),
    "POST /v1/responses": (Scope.GENERATE, RouteKind.GENERATION),
    "GET /v1/responses/{response_id}": (Scope.GENERATE, RouteKind.REQUEST),
    "POST /v1/messages": (Scope.GENERATE, RouteKind.GENERATION),
    "GET /v1/models": (Scope.GENERATE, RouteKind.REQUEST),
    "GET /v1/models/{model:path}": (Scope.GENERATE, RouteKind.REQUEST),
    "GET /bank": (Scope.GENERATE, RouteKind.REQUEST),
    "PUT /users/{user_id}/profile": (Scope.WRITE, RouteKind.REQUEST),
    "POST /users/{user_id}/profile/items": (Scope.WRITE, RouteKind.REQUEST),
    "GET /users/{user_id}/profile/items": (Scope.WRITE, RouteKind.REQUEST),
    "GET /users/{user_id}": (Scope.WRITE, RouteKind.REQUEST),
    "GET /users/{user_id}/export": (Scope.WRITE, RouteKind.REQUEST),
    "DELETE /users/{user_id}": (Scope.WRITE, RouteKind.UNLIMITED),
    "POST /users/{user_id}/feedback": (Scope.WRITE, RouteKind.REQUEST),
    "POST /users/{user_id}/adapt": (Scope.ADAPT, RouteKind.REQUEST),
    "GET /users/{user_id}/adapters": (Scope.ADAPT, RouteKind.REQUEST),
    "POST /users/{user_id}/adapters/{version}/serve": (Scope.ADAPT, RouteKind.REQUEST),
    "GET /jobs/{job_id}": (Scope.ADAPT, RouteKind.REQUEST),
    "GET /jobs/{job_id}/events": (Scope.ADAPT, RouteKind.EVENTS),
    "DELETE /jobs/{job_id}": (Scope.ADAPT, RouteKind.REQUEST),
    "GET /worth": (Scope.ADMIN, RouteKind.REQUEST),
    "GET /metrics": (Scope.ADMIN, RouteKind.OPERATION),
    "GET /health": (OPEN, RouteKind.OPERATION),  # details only with the admin scope
    "GET /ready": (OPEN, RouteKind.OPERATION),  # details only with the admin scope
    "GET /": (OPEN, RouteKind.UNLIMITED),
    "GET /console": (OPEN, RouteKind.UNLIMITED),
    "GET /console/{path:path}": (OPEN, RouteKind.UNLIMITED),
    "GET /docs": (OPEN, RouteKind.UNLIMITED),
    "GET /docs/oauth2-redirect": (OPEN, RouteKind.UNLIMITED),
    "GET /docs/files": (OPEN, RouteKind.UNLIMITED),
    "GET /openapi.json": (OPEN, RouteKind.UNLIMITED),
}

_SCHEME = "API key"


class Counted(Protocol):
    """Counts a request of a caller, and of the user that its path names, for the duration of a `with` block."""

    def __call__(
        self, caller: Caller, user_id: str | None, *, generates: bool
    ) -> AbstractAsyncContextManager[RequestUsage]: ...


def guard(
    app: FastAPI, keys: KnownKeys, max_requests: int, *, counted: Counted, refused: Callable[[str], None]
) -> None:
    """Put the gates before every route that the application has so far, and add the keys to its OpenAPI document.

    `refused` is called with the reason of each refusal. Raise `KeyError` if a route is missing from `ROUTES`.
    """
    places = Shares(lambda: max_requests)
    streams = Shares(lambda: max(1, max_requests // 4))
    by_kind = {RouteKind.EVENTS: [places, streams], RouteKind.OPERATION: []}
    for route in app.routes:
        assert isinstance(route, Route | Mount), route
        methods = {"GET"} if isinstance(route, Mount) else route.methods or set()
        (method,) = methods - {"HEAD"}
        required, kind = ROUTES[f"{method} {route.path}"]
        key_header = getattr(route, "key_header", b"")
        route.app = _Gates(route.app, keys, required, kind, by_kind.get(kind, [places]), counted, refused, key_header)
        if required is not OPEN and isinstance(route, APIRoute):
            route.openapi_extra = {"security": [{_SCHEME: []}, {}]}  # {}: no key is needed while none exists
    # Unknown paths pass the gates too: a page of another origin must not learn which routes exist.
    app.router.default = _Gates(app.router.default, keys, OPEN, RouteKind.OPERATION, (), counted, refused)
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        text = "A key from `mta keys create`; not needed while no key exists."
        document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer", "description": text}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents to extend OpenAPI


@dataclass(frozen=True, eq=False, slots=True)
class _Gates:
    """Checks key, places and limits before a route; stores the caller in the request's state."""

    app: ASGIApp
    keys: KnownKeys
    required: Scope | None
    kind: RouteKind
    places: Sequence[Shares]
    counted: Counted
    refused: Callable[[str], None]
    key_header: bytes = b""  # another than `Authorization` that a key may come in

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        scope["state"]["caller"] = self.keys.caller(scope["headers"], self.key_header)
        if self.required is not OPEN and self.required not in caller_of(scope).scopes:
            raise Forbidden(
                f"this API key lacks the scope `{self.required}`, which this route requires: "
                f"create a key that has it with `{CREATE} NAME --scope {self.required}`"
            )
        name, taken = caller_name_of(scope), list[Shares]()
        try:
            for places in self.places:
                self._acquire(places, name)
                taken.append(places)
            if self.kind in (RouteKind.OPERATION, RouteKind.UNLIMITED):
                await self.app(scope, receive, send)
            else:
                await self._counted(scope, receive, send)
        finally:
            for places in taken:
                places.release(name)

    async def _counted(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        user_id, generates = scope["path_params"].get("user_id"), self.kind is RouteKind.GENERATION
        async with self.counted(caller_of(scope), user_id, generates=generates) as scope["state"]["usage"]:
            await self.app(scope, receive, send)

    def _acquire(self, places: Shares, caller: str) -> None:
        if places.may_acquire(caller):
            places.acquire(caller)
            return
        self.refused("places")
        if places.free < 1:
            full = f"{places.taken} requests are in progress, the maximum: try again in a moment"
            raise Unavailable(full, code="overloaded", retry_after_s=1)
        share = "this API key already has its full share of the requests in progress: try again in a moment"
        raise TooMany(share, code="overloaded", retry_after_s=1)
