"""The engine's only door: it lets through what the product uses, with a key, and answers 404 to everything else.

vLLM opens dozens of routes and checks its key only on some prefixes: the others generate, name adapters or steer the
engine for anybody, and the next release may add more. So this lists what is let through, and stands in front of
everything that vLLM would answer on its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.admission.drain import Drain
from server.engine_protocol import DROP, RESIDENT, STATUS

OPEN = frozenset({("GET", "/health")})
"""Routes that need no key, as method and path."""

WITH_KEY = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),  # evaluation's log-probabilities
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", STATUS),
        ("GET", RESIDENT),
        ("POST", DROP),
    }
)
"""Routes that need one of the engine's keys."""


class Door:
    """ASGI middleware; must be the outermost.

    Args:
        app: the application behind it.
        keys: returns the keys it accepts, as bytes; without any it opens for nobody.
        drain: closes it when the engine is to stop.
    """

    def __init__(self, app: ASGIApp, keys: Callable[[], Sequence[bytes]], drain: Drain) -> None:
        self._app = app
        self._keys = keys
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._drain.take_over()
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := self._refusal(scope)) is None:
            with self._drain.request():
                await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        wanted = scope["method"], scope["path"]
        if scope.get("raw_path", scope["path"].encode()) != scope["path"].encode():
            return _error(404, "no such route: send the engine's paths without percent-escapes")
        if wanted in OPEN or (wanted in WITH_KEY and self._has_key(scope)):
            return _error(503, "this engine is stopping: ask another") if self._drain.begun else None
        if wanted in WITH_KEY:
            return _error(
                401, "missing or wrong engine key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return _error(404, "no such route: the engine serves only what its gateway uses")

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # Every key is compared, so that timing reveals nothing.
        good = [secrets.compare_digest(key, known) for known in self._keys()]
        return scheme.lower() == b"bearer" and any(good)


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)
