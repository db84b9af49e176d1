"""Request bodies: read up to a limit and within a time, and worked through off the event loop where they are large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from typing import TypeVar

from fastapi import Request

from server.errors import TooLarge, TooSlow, Unavailable

SMALL_BYTES = 64 << 10
"""Up to here a body is worked through where it arrives: a millisecond or two."""
LARGE_AT_ONCE = 16
"""Larger bodies that are held in memory; uvicorn stops reading the others where they stop being small."""

T = TypeVar("T")


class Bodies:
    """Reads bodies; `app.state.bodies` is the one of an application.

    Args:
        thread: works through large ones. One thread: it shares the interpreter with the event loop.
        max_bytes: largest body.
        timeout_s: longest time for one to arrive.
    """

    def __init__(self, thread: Executor, max_bytes: int, timeout_s: float) -> None:
        self._thread = thread
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    async def read(self, request: Request, work: Callable[[bytes], T]) -> T:
        """What `work` makes of the body.

        Raises:
            TooLarge: as soon as it is known.
            TooSlow: when the client takes too long.
            Unavailable: when too many large bodies are on their way.
            ClientDisconnect: when it breaks off.
        """
        async with AsyncExitStack() as held:
            body = await self._read(request, held)
            if len(body) <= SMALL_BYTES:
                return work(body)
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, body)

    async def _read(self, request: Request, held: AsyncExitStack) -> bytes:
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise TooLarge(f"the body has {length} bytes, at most {self._max_bytes} are taken", param="body")
        chunks, size, waiting = [], 0, False
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    small, size = size <= SMALL_BYTES, size + len(chunk)
                    if size > self._max_bytes:
                        raise TooLarge(
                            f"the body has more than {self._max_bytes} bytes, which is the most that are taken",
                            param="body",
                        )
                    if small and size > SMALL_BYTES:
                        waiting = True
                        await held.enter_async_context(self._large)
                        waiting = False
                    chunks.append(chunk)
        except TimeoutError:
            if waiting:
                raise Unavailable("too many large bodies are on their way", code="overloaded") from None
            raise TooSlow(
                f"the body did not arrive within {self._timeout_s:g} s, only {size} bytes of it", param="body"
            ) from None
        return b"".join(chunks)


def bodies_of(request: Request) -> Bodies:
    """What reads the body of a request."""
    bodies: Bodies = request.app.state.bodies
    return bodies
