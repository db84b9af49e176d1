"""What each route wants of a key, and takes: one table, which every route must be in, and the one way in.

All that a caller may take is taken here, before the request's body is read, or handed on from here: a place among the
requests in progress, and among the event streams (`shares.py`); what limits count of its key (`limiter.py`). Large
bodies and the engines have places of their own, by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route

from server.errors import Forbidden, TooMany, Unavailable
from server.gateway.access.caller import caller_of, name_of
from server.gateway.access.shares import Shares
from server.gateway.operating.metrics import Metrics
from server.store.tenants.access_keys import CREATE, Scope

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Send
    from starlette.types import Scope as ASGIScope

OPEN = None
"""Wants no key: it says nothing of users, and nothing of the server that its source does not say."""


class Takes(StrEnum):
    """What a request takes of its caller's."""

    NOTHING = "nothing"
    """Operations' own are always served."""
    PLACE = "place"
    """Erasing is never refused for what was asked for before, and who has no key has no limits."""
    REQUEST = "request"
    STREAM = "stream"
    """A request that may last for hours."""
    GENERATION = "generation"
    """A request that needs tokens; what they are, its body says."""


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

TAKES: Mapping[str, Takes] = {
    "POST /generate": Takes.GENERATION,
    "POST /v1/chat/completions": Takes.GENERATION,
    "POST /v1/completions": Takes.GENERATION,
    "GET /jobs/{job_id}/events": Takes.STREAM,
    "DELETE /users/{user_id}": Takes.PLACE,
    "GET /metrics": Takes.NOTHING,
    "GET /health": Takes.NOTHING,
    "GET /ready": Takes.NOTHING,
}
"""Any other open route takes a place, and any other is a request."""

STREAMS = 4
"""The part of all requests in progress that may be event streams of jobs: a quarter."""

_SCHEME = "API key"


def guard(app: FastAPI, most: int, metrics: Metrics) -> None:
    """Have every route that an application has by now let in only who may use it, and its document say so.

    Args:
        app: all of it.
        most: requests in progress at once.
        metrics: counts who is refused.

    Raises:
        KeyError: when a route is not in the table: nobody has said who may use it.
    """
    places = Shares(lambda: most)
    of_kind = {Takes.STREAM: [places, Shares(lambda: max(1, most // STREAMS))], Takes.NOTHING: []}
    for route in app.routes:
        assert isinstance(route, Route), route
        (method,) = (route.methods or set()) - {"HEAD"}
        name = f"{method} {route.path}"
        wanted = ROUTES[name]
        takes = TAKES.get(name, Takes.PLACE if wanted is OPEN else Takes.REQUEST)
        route.app = _Guarded(route.app, wanted, takes, of_kind.get(takes, [places]), metrics)
        if wanted is not OPEN and isinstance(route, APIRoute):
            route.openapi_extra = {"security": [{_SCHEME: []}, {}]}  # or none, while no key exists
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        says = "Of `mta keys create`; nothing while no key exists."
        document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer", "description": says}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of adding to it


class _Guarded:
    """A route behind its scope, places and limits."""

    def __init__(
        self, app: ASGIApp, wanted: Scope | None, takes: Takes, places: Sequence[Shares], metrics: Metrics
    ) -> None:
        self._app = app
        self._wanted = wanted
        self._takes = takes
        self._places = places
        self._metrics = metrics

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if self._wanted is not OPEN and self._wanted not in caller_of(scope).scopes:
            raise Forbidden(
                f"this API key lacks the scope `{self._wanted}`, which this route wants: "
                f"`{CREATE} NAME --scope {self._wanted}` makes one that has it"
            )
        name = name_of(scope)
        with ExitStack() as held:
            for places in self._places:
                self._take(places, name)
                held.callback(places.give_back, name)
            if self._takes in (Takes.NOTHING, Takes.PLACE):
                await self._app(scope, receive, send)
                return
            caller, banks = caller_of(scope), scope["app"].state.banks
            user_id = scope["path_params"].get("user_id")
            user_key = None if user_id is None else banks.usual.tenants.users(caller.tenant).key(user_id)
            generates = self._takes is Takes.GENERATION
            async with banks.usual.limiter.counted(caller, user_key, generates=generates) as counted:
                scope["state"]["counted"] = counted
                await self._app(scope, receive, send)

    def _take(self, places: Shares, caller: str) -> None:
        if places.may_take(caller):
            places.take(caller)
            return
        self._metrics.shed.labels("places").inc()
        if places.free < 1:
            raise Unavailable(
                f"{places.taken} requests are in progress, the most at once: try again in a moment",
                code="overloaded",
                retry_after_s=1,
            )
        raise TooMany(
            "this API key has its share of all that can be in progress at once: try again in a moment",
            code="overloaded",
            retry_after_s=1,
        )
