"""Streamed responses: server-sent events and client disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import nullcontext
from operator import methodcaller
from typing import Any, Self, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Send

KEEP_ALIVE_S = 15.0  # maximum silence of a stream; proxies close streams that are silent for much longer

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not cache or buffer events
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_DUMPED = methodcaller("model_dump", mode="json")

T = TypeVar("T")


def event(value: object, name: str = "") -> bytes:
    """Encode an event with `value` as JSON; the value may contain pydantic models."""
    named = f"event: {name}\n".encode() if name else b""
    return named + b"data: " + orjson.dumps(value, default=_DUMPED) + b"\n\n"


class EventSender:
    """Sends a stream of events, and a comment, which clients ignore, after `KEEP_ALIVE_S` without an event.

    Status 200 and `headers()` precede the first of them. Once the stream has `begun`, an error can only be an event.
    The response ends with the context, unless an exception passes.
    """

    def __init__(self, send: Send, headers: Callable[[], Mapping[str, str]]) -> None:
        self.begun = False
        self._send = send
        self._headers = headers
        self._sent_s = time.monotonic()
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._keeping_alive = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(self, error: object, *_: object) -> None:
        async with nullcontext() if error else self._turn:
            self._keeping_alive.cancel()
            await asyncio.gather(self._keeping_alive, return_exceptions=True)
            if not error:  # from now on `receive` reports a disconnect, even if the client has the complete response
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def write(self, data: bytes) -> None:
        async with self._turn:
            if not self.begun:
                self.begun = True
                head = Response(headers=_HEADERS | dict(self._headers()), media_type="text/event-stream").raw_headers
                head = [(name, value) for name, value in head if name != b"content-length"]
                await self._send({"type": "http.response.start", "status": 200, "headers": head})
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._sent_s = time.monotonic()

    async def _keep_alive(self) -> None:
        while True:
            left_s = self._sent_s + KEEP_ALIVE_S - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self.write(KEEP_ALIVE)


class ClientGone(Exception):
    pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; if the client disconnects, cancel it and raise `ClientGone`. The body must have been read before."""
    working, is_gone = asyncio.current_task(), False
    assert working

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if is_gone and not working.uncancel():
            raise ClientGone from None
        raise
    finally:
        watching.cancel()
