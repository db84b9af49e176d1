"""Every route with the scope that it wants, and the first two of a request's three gates, both before its body is read.

First the number of requests, of all and of each caller (`shares.py`); then what its key may do, and may use
(`limiter.py`). The third gate is the queue before the engines (`queue.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route

from server.errors import Forbidden, TooMany, Unavailable
from server.gateway.access.keys import KnownKeys, caller_of, name_of
from server.gateway.access.shares import Shares
from server.store.tenants.access_keys import CREATE, Scope

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Send
    from starlette.types import Scope as ASGIScope

OPEN = None
"""Wants no key: it says nothing of users, and nothing of the server that its source does not say."""


class RouteKind(StrEnum):
    """What a request takes of its caller's share."""

    OPERATION = "operation"  # nothing: those who run the server are always served
    UNLIMITED = "unlimited"  # a place: erasing must always work, and callers without a key have no limits
    REQUEST = "request"  # a place, and one of the key's requests
    EVENTS = "events"  # the same, and a place among the event streams: it may last for hours
    GENERATION = "generation"  # a request, and as many tokens as its body says


ROUTES: Mapping[str, Scope | None] = {
    "POST /generate": Scope.GENERATE,
    "POST /v1/chat/completions": Scope.GENERATE,
    "POST /v1/completions": Scope.GENERATE,
    "GET /v1/models": Scope.GENERATE,
    "GET /v1/models/{model:path}": Scope.GENERATE,
    "GET /bank": Scope.GENERATE,
    "PUT /users/{user_id}/profile": Scope.WRITE,
    "POST /users/{user_id}/profile/items": Scope.WRITE,
    "GET /users/{user_id}": Scope.WRITE,
    "GET /users/{user_id}/export": Scope.WRITE,
    "DELETE /users/{user_id}": Scope.WRITE,
    "POST /users/{user_id}/adapt": Scope.ADAPT,
    "GET /jobs/{job_id}": Scope.ADAPT,
    "GET /jobs/{job_id}/events": Scope.ADAPT,
    "DELETE /jobs/{job_id}": Scope.ADAPT,
    "GET /metrics": Scope.ADMIN,
    "GET /health": OPEN,  # in detail to admin alone, and so is the next
    "GET /ready": OPEN,
    "GET /": OPEN,
    "GET /console": OPEN,
    "GET /console/": OPEN,
    "GET /console/{path:path}": OPEN,
    "GET /docs": OPEN,
    "GET /docs/oauth2-redirect": OPEN,
    "GET /redoc": OPEN,
    "GET /openapi.json": OPEN,
}

KINDS: Mapping[str, RouteKind] = {
    "POST /generate": RouteKind.GENERATION,
    "POST /v1/chat/completions": RouteKind.GENERATION,
    "POST /v1/completions": RouteKind.GENERATION,
    "GET /jobs/{job_id}/events": RouteKind.EVENTS,
    "DELETE /users/{user_id}": RouteKind.UNLIMITED,
    "GET /metrics": RouteKind.OPERATION,
    "GET /health": RouteKind.OPERATION,
    "GET /ready": RouteKind.OPERATION,
}
"""Any other open route is unlimited, and any other is a request."""

STREAMS = 4  # a quarter of all requests in progress may be event streams of jobs

_SCHEME = "API key"


def guard(app: FastAPI, keys: KnownKeys, most: int, refused: Callable[[str], None]) -> None:
    """Put the gates before every route that an application has by now, and have its document say so.

    At most so many requests are in progress; `refused` is called with the reason whenever one finds no room. Raises
    `KeyError` for a route that is not in the table: nobody has said who may use it.
    """
    places = Shares(lambda: most)
    of_kind = {RouteKind.EVENTS: [places, Shares(lambda: max(1, most // STREAMS))], RouteKind.OPERATION: []}
    for route in app.routes:
        assert isinstance(route, Route), route
        (method,) = (route.methods or set()) - {"HEAD"}
        name = f"{method} {route.path}"
        wanted = ROUTES[name]
        kind = KINDS.get(name, RouteKind.UNLIMITED if wanted is OPEN else RouteKind.REQUEST)
        route.app = _Gates(route.app, keys, wanted, kind, of_kind.get(kind, [places]), refused)
        if wanted is not OPEN and isinstance(route, APIRoute):
            route.openapi_extra = {"security": [{_SCHEME: []}, {}]}  # or none, while no key exists
    # A page from elsewhere does not even learn which routes there are.
    app.router.default = _Gates(app.router.default, keys, OPEN, RouteKind.OPERATION, (), refused)
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        says = "Of `mta keys create`; nothing while no key exists."
        document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer", "description": says}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of adding to it


@dataclass(frozen=True, eq=False, slots=True)
class _Gates:
    """A route behind its key, places and limits; notes the caller in a request's state, for `caller_of`."""

    app: ASGIApp
    keys: KnownKeys
    wanted: Scope | None
    kind: RouteKind
    places: Sequence[Shares]
    refused: Callable[[str], None]

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        scope["state"]["caller"] = self.keys.caller(scope["headers"])
        if self.wanted is not OPEN and self.wanted not in caller_of(scope).scopes:
            raise Forbidden(
                f"this API key lacks the scope `{self.wanted}`, which this route wants: "
                f"`{CREATE} NAME --scope {self.wanted}` makes one that has it"
            )
        name, taken = name_of(scope), list[Shares]()
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
        caller, parts = caller_of(scope), scope["app"].state.gateway.usual
        user_id = scope["path_params"].get("user_id")
        user_key = None if user_id is None else parts.tenants.users(caller.tenant).key(user_id)
        generates = self.kind is RouteKind.GENERATION
        async with parts.limiter.counted(caller, user_key, generates=generates) as scope["state"]["usage"]:
            await self.app(scope, receive, send)

    def _acquire(self, places: Shares, caller: str) -> None:
        if places.may_acquire(caller):
            places.acquire(caller)
            return
        self.refused("places")
        if places.free < 1:
            full = f"{places.taken} requests are in progress, the most at once: try again in a moment"
            raise Unavailable(full, code="overloaded", retry_after_s=1)
        share = "this API key has its share of all that can be in progress at once: try again in a moment"
        raise TooMany(share, code="overloaded", retry_after_s=1)
