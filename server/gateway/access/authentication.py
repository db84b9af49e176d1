"""Who sends a request, found out before anything else is done for it; what they may do, its route decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import Forbidden
from server.gateway.access.caller import Caller
from server.gateway.access.known_keys import KnownKeys
from server.gateway.http.errors import error_response
from server.gateway.http.middleware import notes_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class Authentication:
    """Notes the caller in a request's state, for `caller_of`. It must be inside `RequestLog`.

    Args:
        app: what answers.
        keys: those that count.
    """

    def __init__(self, app: ASGIApp, keys: KnownKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                caller = self._keys.caller(scope["headers"])
            except Forbidden as error:
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["caller"] = caller
            if isinstance(caller, Caller):
                notes_of(scope).tenant = caller.tenant
        await self._app(scope, receive, send)
