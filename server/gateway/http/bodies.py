"""Request bodies: read within limits of size and time, and parsed off the event loop if they are large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TypeVar

from fastapi import Request

from server.errors import TooLarge, TooSlow, Unavailable

MAX_BODY_BYTES = 8 << 20
BODY_TIMEOUT_S = 60.0
"""For a body to arrive. For how long it is remembered that somebody unknown was erased must be longer."""
SMALL_BYTES = 64 << 10
"""Bodies up to this size are parsed on the event loop: it takes a millisecond or two."""
LARGE_AT_ONCE = 16
"""Most larger bodies held in memory, of one caller a share; uvicorn stops reading the others once they are no longer
small."""

T = TypeVar("T")


class BodyReader:
    """Reads bodies.

    Args:
        thread: parses large ones. Only one thread: it shares the interpreter with the event loop.
        large: waits for one of the `LARGE_AT_ONCE` places for a request's large body, and holds it.
    """

    def __init__(self, thread: Executor, large: Callable[[Request], AbstractAsyncContextManager[None]]) -> None:
        self._thread = thread
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
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise TooLarge(f"the body has {length} bytes, at most {MAX_BODY_BYTES} are allowed", param="body")
        chunks, size, waiting = [], 0, False
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    small, size = size <= SMALL_BYTES, size + len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise TooLarge(
                            f"the body has more than {MAX_BODY_BYTES} bytes, the most that are allowed",
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
                f"the body did not arrive within {BODY_TIMEOUT_S:g} s: only {size} bytes of it did", param="body"
            ) from None
        return b"".join(chunks)
