"""An answer in progress, streamed or whole, read from the engine's chat completions.

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

_USER_ADAPTER = re.compile(r":u-[a-z2-7.]*")


class EngineStream:
    """An answer in progress: call `begin`, then iterate `texts`; everything is known when that ends.

    Attributes:
        sent_s: when the request was sent, by the performance counter.
        first_token_s: when the first token came; None when the answer came whole.
        prompt_tokens: length of the prompt; None if the engine does not report it with the first piece.
        finish_reason: OpenAI's, None before the end.
        usage: token counts as the engine reported them.
        complete: whether the whole answer has been read.
    """

    def __init__(self, chunks: ByteChunks, sent_s: float, *, streamed: bool = True) -> None:
        self.sent_s = sent_s
        self.first_token_s: float | None = None
        self.prompt_tokens: int | None = None
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}
        self.complete = False
        self._streamed = streamed
        self._pieces = self._read(chunks)
        self._first = ""

    async def begin(self) -> None:
        """Wait for the first piece.

        Raises:
            EngineFailed: when the engine breaks off first, or sends something that is not an answer.
        """
        self._first = await anext(self._pieces, "")
        if self._streamed:
            self.first_token_s = time.perf_counter()
        self.prompt_tokens = self.usage.get("prompt_tokens")

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of text, none empty.

        Raises:
            EngineFailed: when the engine breaks off, or sends something that is not an answer.
        """
        if self._first:
            yield self._first
        async for text in self._pieces:
            if text:
                yield text

    async def _read(self, chunks: ByteChunks) -> AsyncGenerator[str, None]:
        """The text of every chunk, often empty, or of the whole answer."""
        try:
            if self._streamed:
                async for chunk in events(chunks):
                    yield self._take(chunk, "delta")
            else:
                yield self._take(orjson.loads(await chunks.read()), "message")
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine fell silent in the middle of the answer", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError, EOFError) as error:
            raise EngineFailed("the engine broke off in the middle of the answer: send the request again") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise EngineFailed("the engine sent something that is not a chat completion") from error
        if self.finish_reason is None:
            raise EngineFailed("the engine ended the answer without a finish reason")
        self.complete = True

    def _take(self, chunk: dict[str, Any], part: str) -> str:
        if "error" in chunk:
            message = for_clients(excerpt(chunk["error"], 300))
            raise EngineFailed(f"the engine failed in the middle of the answer: {message}")
        usage = chunk.get("usage")
        if usage:
            self.usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        if not chunk["choices"]:
            return ""
        choice = chunk["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return choice[part].get("content") or ""


def for_clients(message: str) -> str:
    """An engine's message, without the user adapters in recipe names."""
    return _USER_ADAPTER.sub("", message)
