"""What each route wants of a key: one table, which every route must be in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route

from server.errors import Forbidden
from server.gateway.access.caller import caller_of
from server.store.tenants.access_keys import CREATE, Scope

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Send
    from starlette.types import Scope as ASGIScope

OPEN = None
"""Wants no key: it says nothing of users, and nothing of the server that its source does not say."""

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

_SCHEME = "API key"


def guard(app: FastAPI) -> None:
    """Have every route that an application has by now let in only keys that may use it, and its document say so.

    The key is looked at before the body is read: a request without the right one costs next to nothing.

    Raises:
        KeyError: when a route is not in the table: nobody has said who may use it.
    """
    for route in app.routes:
        assert isinstance(route, Route), route
        (method,) = (route.methods or set()) - {"HEAD"}
        wanted = ROUTES[f"{method} {route.path}"]
        if wanted is not OPEN:
            route.app = _Guarded(route.app, wanted)
            if isinstance(route, APIRoute):
                route.openapi_extra = {"security": [{_SCHEME: []}, {}]}  # or none, while no key exists
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        says = "Of `mta keys create`; nothing while no key exists."
        document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer", "description": says}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of adding to it


class _Guarded:
    """A route behind its scope."""

    def __init__(self, app: ASGIApp, wanted: Scope) -> None:
        self._app = app
        self._wanted = wanted

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if self._wanted not in caller_of(scope).scopes:
            raise Forbidden(
                f"this API key lacks the scope `{self._wanted}`, which this route wants: "
                f"`{CREATE} NAME --scope {self._wanted}` makes one that has it"
            )
        await self._app(scope, receive, send)
