"""Request bodies: read within limits of size and time, and parsed off the event loop if they are large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TypeVar

from fastapi import Request

from server.errors import TooLarge, TooSlow, Unavailable

SMALL_BYTES = 64 << 10
"""Bodies up to this size are parsed on the event loop: it takes a millisecond or two."""
LARGE_AT_ONCE = 16
"""Most larger bodies held in memory, of one caller a share; uvicorn stops reading the others once they are no longer
small."""

T = TypeVar("T")


class Bodies:
    """Reads bodies; each application has one, in `app.state.bodies`.

    Args:
        thread: parses large ones. Only one thread: it shares the interpreter with the event loop.
        max_bytes: largest body.
        timeout_s: longest time for one to arrive.
        large: waits for one of the `LARGE_AT_ONCE` places for a request's large body, and holds it.
    """

    def __init__(
        self,
        thread: Executor,
        max_bytes: int,
        timeout_s: float,
        large: Callable[[Request], AbstractAsyncContextManager[None]],
    ) -> None:
        self._thread = thread
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._large = large

    async def read(self, request: Request, work: Callable[[bytes], T]) -> T:
        """Read the body and return what `work` makes of it.

        Raises:
            TooLarge: as soon as this is known.
            TooSlow: when the client takes too long.
            Unavailable: when too many large bodies are being received.
            ClientDisconnect: when the client breaks off.
        """
        async with AsyncExitStack() as held:
            body = await self._read(request, held)
            if len(body) <= SMALL_BYTES:
                return work(body)
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, body)

    async def _read(self, request: Request, held: AsyncExitStack) -> bytes:
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise TooLarge(f"the body has {length} bytes, at most {self._max_bytes} are allowed", param="body")
        chunks, size, waiting = [], 0, False
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    small, size = size <= SMALL_BYTES, size + len(chunk)
                    if size > self._max_bytes:
                        raise TooLarge(
                            f"the body has more than {self._max_bytes} bytes, the most that are allowed",
                            param="body",
                        )
                    if small and size > SMALL_BYTES:
                        waiting = True
                        await held.enter_async_context(self._large(request))
                        waiting = False
                    chunks.append(chunk)
        except TimeoutError:
            if waiting:
                raise Unavailable(
                    "too many large bodies are being received: try again in a moment", code="overloaded"
                ) from None
            raise TooSlow(
                f"the body did not arrive within {self._timeout_s:g} s: only {size} bytes of it did", param="body"
            ) from None
        return b"".join(chunks)


def bodies_of(request: Request) -> Bodies:
    """The reader of a request's body."""
    bodies: Bodies = request.app.state.bodies
    return bodies
