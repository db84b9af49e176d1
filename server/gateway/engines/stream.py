"""An answer in progress, streamed or whole, read from the engine's chat completions or completions.

Streamed, the usage in every chunk tells the prompt's length before anything is passed on. Whole, it is known only at
the end, but neither side spends time on chunks, which for a small model is much of an answer's time.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, Protocol, Self

import aiohttp
import orjson

from adapters.errors import excerpt
from server.errors import EngineFailed

Piece = tuple[str, dict[str, Any]]
"""The text of the first choice, often empty, and the JSON value that it came in."""

_DATA = b"data:"
_END = b"[DONE]"
_ABORTED = "abort"
"""The finish reason with which vLLM gives up an answer, e.g. as it is stopped."""
_USER_ADAPTER = re.compile(r":u-[a-z2-7.]*")


class ByteChunks(Protocol):
    """What arrives from the network, in pieces of any size."""

    def iter_any(self) -> AsyncIterator[bytes]: ...

    async def read(self) -> bytes: ...


async def events(chunks: ByteChunks) -> AsyncGenerator[Any, None]:
    """The JSON values of a stream of server-sent events, up to `[DONE]`; comments and empty lines are skipped.

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


async def _whole(chunks: ByteChunks) -> AsyncGenerator[Any, None]:
    yield orjson.loads(await chunks.read())


class BrokeOff(EngineFailed):
    """The engine ended before the answer did, or gave it up."""

    received, silent = True, False
    """As of `EngineUnavailable`."""

    def __init__(self) -> None:
        super().__init__("the engine broke off in the middle of the answer: send the request again")


class EngineStream:
    """An answer in progress: call `begin`, then iterate over its pieces; everything is known when they end.

    Iterating raises `EngineFailed` when the engine breaks off, or sends something that is not an answer.

    Attributes:
        sent_s: when the request was sent, by the performance counter.
        first_token_s: when the first token came; None when the answer came whole.
        prompt_tokens: None if the engine does not report it with the first piece.
        finish_reason: OpenAI's, of the first choice; None before the end.
        usage: token counts as the engine reported them.
        complete: whether the whole answer has been read.
    """

    def __init__(self, chunks: ByteChunks, sent_s: float, *, streamed: bool = True, chat: bool = True) -> None:
        self.sent_s = sent_s
        self.first_token_s: float | None = None
        self.prompt_tokens: int | None = None
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}
        self.complete = False
        self._streamed = streamed
        self._field = ("delta" if streamed else "message") if chat else "text"
        self._values = events(chunks) if streamed else _whole(chunks)
        self._first: Piece | None = None

    async def begin(self) -> None:
        """Wait for the first piece."""
        with suppress(StopAsyncIteration):
            self._first = await self._next()
        if self._streamed:
            self.first_token_s = time.perf_counter()
        self.prompt_tokens = self.usage.get("prompt_tokens")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self._first is None:
            return await self._next()
        piece, self._first = self._first, None
        return piece

    async def _next(self) -> Piece:
        try:
            value = await anext(self._values)
            return self._read(value), value
        except StopAsyncIteration:
            if self.finish_reason is None:
                raise EngineFailed("the engine ended the answer without a finish reason") from None
            self.complete = True
            raise
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine fell silent in the middle of the answer", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError, EOFError) as error:
            raise BrokeOff from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise EngineFailed("the engine sent something that is not a completion") from error

    def _read(self, chunk: dict[str, Any]) -> str:
        if "error" in chunk:
            message = for_clients(excerpt(chunk["error"], 300))
            raise EngineFailed(f"the engine failed in the middle of the answer: {message}")
        usage = chunk.get("usage")
        if usage:
            self.usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        choices = chunk["choices"]
        if not choices:
            return ""
        if any(choice.get("finish_reason") == _ABORTED for choice in choices):
            raise BrokeOff
        self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
        said = choices[0][self._field]
        return (said if self._field == "text" else said.get("content")) or ""


def for_clients(message: str) -> str:
    """An engine's message, without the user adapters in recipe names."""
    return _USER_ADAPTER.sub("", message)
