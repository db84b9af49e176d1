"""Answers on their way: server-sent events, as clients get them, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import orjson
from pydantic import BaseModel
from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.types import Receive, Send

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers of event streams: no proxy may cache them, or hold them back until they are complete."""

KEEP_ALIVE_S = 15.0
"""Longest silence of a stream: proxies take a much longer one for its end."""

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(value: object, name: str = "") -> bytes:
    """One event that carries `value` as JSON; it may contain models at any depth, and have a name."""
    named = f"event: {name}\n".encode() if name else b""
    return named + b"data: " + orjson.dumps(value, default=_dumped) + b"\n\n"


def _dumped(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError


class EventSender:
    """Sends a stream of events, and after `KEEP_ALIVE_S` without one a comment, which clients ignore.

    The head of the response goes out with whichever comes first. A context manager around all that is sent.

    Args:
        headers: called when the head is sent; added to those of every stream.

    Attributes:
        begun: whether the head has been sent: from then on the status is 200, and an error can only be an event.
    """

    def __init__(self, send: Send, headers: Callable[[], Mapping[str, str]]) -> None:
        self.begun = False
        self._send = send
        self._headers = headers
        self._sent_s = time.monotonic()
        self._turn = asyncio.Lock()
        self._keeping_alive: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._keeping_alive = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeping_alive
        self._keeping_alive.cancel()
        await asyncio.gather(self._keeping_alive, return_exceptions=True)

    async def write(self, data: bytes) -> None:
        """Send whole events."""
        async with self._turn:
            if not self.begun:
                self.begun = True
                head = Response(headers=_HEADERS | dict(self._headers()), media_type="text/event-stream").raw_headers
                head = [(name, value) for name, value in head if name != b"content-length"]
                await self._send({"type": "http.response.start", "status": 200, "headers": head})
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._sent_s = time.monotonic()

    async def end(self) -> None:
        """End the response; nothing can be sent after it."""
        async with self._turn:
            assert self._keeping_alive
            self._keeping_alive.cancel()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self) -> None:
        while True:
            left_s = self._sent_s + KEEP_ALIVE_S - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self.write(KEEP_ALIVE)


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or cancel it as soon as the client is gone; for requests whose body has been read.

    Raises:
        ClientGone: once `work` has been cancelled and has cleaned up.
    """
    working, is_gone = asyncio.current_task(), False
    assert working

    async def watch() -> None:
        nonlocal is_gone
        await _disconnect(receive)
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


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
