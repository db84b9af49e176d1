"""Access control and graceful shutdown of the engine's HTTP server.

vLLM has dozens of routes and checks its key on some only. Here, every route that the product does not use answers 404.
A stopping vLLM would return empty texts. Here, new requests then get a 503, and open requests finish first.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine_protocol import DROP, RESIDENT, STATUS

log = logging.getLogger("vllm.mta")

PUBLIC_ROUTES = {("GET", "/health")}  # method and path of routes that need no key

KEYED_ROUTES = {  # method and path of routes that need one of the engine's keys
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),  # for log-probabilities in evaluation
    ("POST", "/tokenize"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", STATUS),
    ("GET", RESIDENT),
    ("POST", DROP),
}

_stop_vllm = partial(signal.raise_signal, signal.SIGINT)  # whose handler is still vLLM's own, which stops at once


class Drain:
    """Counts open requests; once started, stops the engine when none is open or after `timeout_s`."""

    def __init__(self, timeout_s: float, stop: Callable[[], None] = _stop_vllm) -> None:
        self.started: asyncio.Task[None] | None = None  # if set, new requests are refused
        self._timeout_s, self._stop = timeout_s, stop
        self._open, self._idle = 0, asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        if self.started is None:
            log.info("stopping: waiting up to %g s for %d open requests", self._timeout_s, self._open)
            self.started = asyncio.get_running_loop().create_task(self._finish())

    @contextmanager
    def request(self) -> Iterator[None]:
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _finish(self) -> None:
        try:
            await asyncio.wait_for(self._idle.wait(), self._timeout_s)
        except TimeoutError:
            log.warning("aborting %d requests that are still open after %g s", self._open, self._timeout_s)
        self._stop()


@dataclass(frozen=True)
class AccessMiddleware:
    """Outermost ASGI middleware. Without keys, only public routes are open."""

    app: ASGIApp
    keys: Callable[[], Sequence[bytes]]
    drain: Drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # vLLM has installed its own handler before
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.drain.start)
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
        if wanted in PUBLIC_ROUTES or (wanted in KEYED_ROUTES and self._has_key(scope)):
            return _error(503, "this engine is stopping: use another engine") if self.drain.started else None
        if wanted in KEYED_ROUTES:
            return _error(401, "missing or wrong engine key", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return _error(404, "no such route: the engine serves only what its gateway uses")

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # Compare with every key, so that the timing reveals nothing.
        good = [secrets.compare_digest(key, known) for known in self.keys()]
        return scheme.lower() == b"bearer" and any(good)


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)
