"""The engine's only door: it lets through what the product uses, with a key, and answers 404 to everything else.

vLLM opens dozens of routes and checks its key on some alone. It would also answer what arrives while it stops with an
empty text: here that is a 503, which sends a router on, and vLLM stops once what had begun is finished.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine_protocol import DROP, RESIDENT, STATUS

log = logging.getLogger("mta.engine")

OPEN = frozenset({("GET", "/health")})  # routes that need no key, as method and path

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


def _stop_vllm() -> None:
    """vLLM stops at once on either signal; the other one is still its own."""
    os.kill(os.getpid(), signal.SIGINT)


class Drain:
    """Counts what is under way, and once the engine is asked to stop, waits for its end, for at most `most_s`."""

    def __init__(self, most_s: float, stop: Callable[[], None] = _stop_vllm) -> None:
        self.begun = False  # whether nothing new is taken
        self._most_s = most_s
        self._stop = stop
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending: asyncio.Task[None] | None = None  # the event loop holds tasks only weakly

    def take_over(self) -> None:
        """Have SIGTERM begin the drain; vLLM's handler must be in place already."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.begin)

    def begin(self) -> None:
        """Take nothing new, and end the engine once nothing is under way, or the time is up."""
        if not self.begun:
            self.begun = True
            log.info("asked to stop: %d requests are finished first, for at most %g s", self._under_way, self._most_s)
            self._ending = asyncio.get_running_loop().create_task(self._end())

    @contextmanager
    def request(self) -> Iterator[None]:
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _end(self) -> None:
        try:
            await asyncio.wait_for(self._idle.wait(), self._most_s)
        except TimeoutError:
            log.warning("%d requests are cut off: they took more than %g s", self._under_way, self._most_s)
        self._stop()


@dataclass(frozen=True)
class Door:
    """ASGI middleware, the outermost; without any keys it opens for nobody."""

    app: ASGIApp
    keys: Callable[[], Sequence[bytes]]
    drain: Drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.drain.take_over()
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := self._refusal(scope)) is None:
            with self.drain.request():
                await self.app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        wanted = scope["method"], scope["path"]
        if scope.get("raw_path", scope["path"].encode()) != scope["path"].encode():
            return _error(404, "no such route: send the engine's paths without percent-escapes")
        if wanted in OPEN or (wanted in WITH_KEY and self._has_key(scope)):
            return _error(503, "this engine is stopping: ask another") if self.drain.begun else None
        if wanted in WITH_KEY:
            return _error(
                401, "missing or wrong engine key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return _error(404, "no such route: the engine serves only what its gateway uses")

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # Every key is compared, so that timing reveals nothing.
        good = [secrets.compare_digest(key, known) for known in self.keys()]
        return scheme.lower() == b"bearer" and any(good)


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)
