"""Server-sent events, as engines send them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import orjson

_DATA = b"data:"
_END = b"[DONE]"


class ByteChunks(Protocol):
    """What arrives from the network, in pieces of any size."""

    def iter_any(self) -> AsyncIterator[bytes]: ...

    async def read(self) -> bytes: ...


async def events(chunks: ByteChunks) -> AsyncIterator[Any]:
    """The JSON values of a stream of events, up to `[DONE]`; comments and empty lines are skipped.

    Raises:
        ValueError: when an event is not JSON.
        EOFError: when the stream ends without `[DONE]`.
    """
    rest = b""
    async for chunk in chunks.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(_DATA):
                continue
            data = line[len(_DATA) :].strip()
            if data == _END:
                return
            yield orjson.loads(data)
    raise EOFError("the stream ended without [DONE]")
