"""An answer in progress, streamed or whole, read from the engine's chat completions or completions.

When streamed, the usage in every chunk gives the prompt's length before anything is passed on. When whole, it is known
only at the end, but neither side spends time on chunks, which for a small model is much of an answer's time.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp
import orjson

from adapters.errors import excerpt
from server.errors import EngineFailed
from server.gateway.engines.sse import ByteChunks, events

Piece = tuple[str, dict[str, Any]]
"""The text of the first choice, often empty, and the JSON value that it came in."""

_USER_ADAPTER = re.compile(r":u-[a-z2-7.]*")


_ABORTED = "abort"
"""How vLLM ends what it gave up on, e.g. as it was stopped: as if the text were complete."""


class BrokeOff(EngineFailed):
    """The engine ended before the answer did, or gave it up."""

    def __init__(self) -> None:
        super().__init__("the engine broke off in the middle of the answer: send the request again")


class EngineStream:
    """An answer in progress: call `begin`, then iterate `pieces`; everything is known when that ends.

    Attributes:
        sent_s: when the request was sent, by the performance counter.
        first_token_s: when the first token came; None when the answer came whole.
        prompt_tokens: length of the prompt; None if the engine does not report it with the first piece.
        finish_reason: OpenAI's, None before the end.
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
        self._part = ("delta" if streamed else "message") if chat else "text"
        self._read_on = self._read(chunks)
        self._first: Piece | None = None

    async def begin(self) -> None:
        """Wait for the first piece.

        Raises:
            EngineFailed: when the engine breaks off first, or sends something that is not an answer.
        """
        self._first = await anext(self._read_on, None)
        if self._streamed:
            self.first_token_s = time.perf_counter()
        self.prompt_tokens = self.usage.get("prompt_tokens")

    async def pieces(self) -> AsyncIterator[Piece]:
        """All that the engine sends: chunks, or the whole answer.

        Raises:
            EngineFailed: when the engine breaks off, or sends something that is not an answer.
        """
        if self._first:
            yield self._first
        async for piece in self._read_on:
            yield piece

    async def _read(self, chunks: ByteChunks) -> AsyncGenerator[Piece, None]:
        try:
            if self._streamed:
                async for chunk in events(chunks):
                    yield self._take(chunk), chunk
            else:
                whole = orjson.loads(await chunks.read())
                yield self._take(whole), whole
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine fell silent in the middle of the answer", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError, EOFError) as error:
            raise BrokeOff from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise EngineFailed("the engine sent something that is not a completion") from error
        if self.finish_reason is None:
            raise EngineFailed("the engine ended the answer without a finish reason")
        self.complete = True

    def _take(self, chunk: dict[str, Any]) -> str:
        if "error" in chunk:
            message = for_clients(excerpt(chunk["error"], 300))
            raise EngineFailed(f"the engine failed in the middle of the answer: {message}")
        usage = chunk.get("usage")
        if usage:
            self.usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        if not chunk["choices"]:
            return ""
        if any(choice.get("finish_reason") == _ABORTED for choice in chunk["choices"]):
            raise BrokeOff
        choice = chunk["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        part = choice[self._part]
        return (part if self._part == "text" else part.get("content")) or ""


async def texts_of(pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """The texts of an answer's pieces, none empty."""
    async for text, _ in pieces:
        if text:
            yield text


def for_clients(message: str) -> str:
    """An engine's message, without the user adapters in recipe names."""
    return _USER_ADAPTER.sub("", message)
