"""The engine's only door: what the product uses of it, with a key; everything else is not there.

vLLM opens dozens of routes and asks for its key on some prefixes alone: others generate, name adapters or steer the
engine for anybody. Nor are the ones it adds next year known today. So this lists what is let through, and stands before
all that vLLM would answer by itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine_protocol import DROP, RESIDENT, STATUS

OPEN = frozenset({("GET", "/health")})
"""Method and path of what needs no key."""

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
"""Method and path of what needs one of the engine's keys."""


class Door:
    """ASGI middleware, to be the outermost one.

    Args:
        app: what is behind it.
        keys: those that open it, in bytes; none opens nothing.
    """

    def __init__(self, app: ASGIApp, keys: Callable[[], Sequence[bytes]]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := self._refusal(scope)) is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        wanted = scope["method"], scope["path"]
        if scope.get("raw_path", scope["path"].encode()) != scope["path"].encode():
            return _error(404, "no such route: the engine's paths are written plainly, without escapes")
        if wanted in OPEN or (wanted in WITH_KEY and self._has_key(scope)):
            return None
        if wanted in WITH_KEY:
            return _error(
                401, "missing or wrong engine key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return _error(404, "no such route: the engine serves what its gateway uses, and nothing else")

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # All of them are compared, so that time says nothing.
        good = [secrets.compare_digest(key, known) for known in self._keys()]
        return scheme.lower() == b"bearer" and any(good)


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)
