"""The way to the engine: OpenAI's chat completions over HTTP, streamed or whole.

Streamed, usage in every chunk tells the prompt's length before anything is passed on. Whole, it is known at the end
only, but neither side spends time on chunks, which for a small model is much of an answer's time. Closing the
connection tells vLLM to abort either way. Every failure becomes one of our errors here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from adapters.errors import MtaError, excerpt
from server.errors import EngineFailed, InvalidRequest, Unavailable
from server.gateway.http.streaming import ByteChunks, events

BASE_MODEL = "base"
"""The name under which engines serve the base model."""

_KEEP_ALIVE_S = 4.0  # below vLLM's own 5 s: a connection is never taken up while the engine closes it
_CONNECT_TIMEOUT_S = 3.0
_DRAIN_TIMEOUT_S = 1.0
_USER_ADAPTER = re.compile(r":u-[a-z2-7.]*")
_PROMPT_PARAMS = frozenset(("input_tokens", "input_text", "prompt", "messages"))


class AdapterMissing(MtaError):
    """The engine cannot serve the model it was asked for: another bank, an unknown anchor, a lost user adapter."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation.

    Attributes:
        request_id: also the engine's id for it, so that logs can be joined.
        model: a recipe name, or `base`.
        messages: the conversation in OpenAI's shape.
        sampling: fields passed on as they are: max_tokens, temperature, top_p, stop, seed.
        prompt_param: the client's name for the conversation, for errors: `prompt` or `messages`.
        stream: whether the answer is to come in pieces.
    """

    request_id: str
    model: str
    messages: list[dict[str, str]]
    sampling: Mapping[str, Any]
    prompt_param: str
    stream: bool = True


class EngineStream:
    """An answer under way. Its first piece is there; iterate `texts`, and the rest is known when that ends.

    Attributes:
        sent_s: when the request left, by the performance counter.
        first_token_s: when the first token came; None when the answer came whole.
        prompt_tokens: length of the prompt; None when the engine does not tell before the end.
        finish_reason: OpenAI's, None before the end.
        usage: token counts as the engine gave them.
        complete: whether the engine has said all it had to say.
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
            EngineFailed: when the engine breaks off before, or sends what is no answer.
        """
        self._first = await anext(self._pieces, "")
        if self._streamed:
            self.first_token_s = time.perf_counter()
        self.prompt_tokens = self.usage.get("prompt_tokens")

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of text, none empty.

        Raises:
            EngineFailed: when the engine breaks off or sends what is no answer.
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
            raise EngineFailed("the engine sent something that is no chat completion") from error
        if self.finish_reason is None:
            raise EngineFailed("the engine ended the answer without a finish reason")
        self.complete = True

    def _take(self, chunk: dict[str, Any], part: str) -> str:
        if "error" in chunk:
            message = _for_clients(excerpt(chunk["error"], 300))
            raise EngineFailed(f"the engine failed in the middle of the answer: {message}")
        usage = chunk.get("usage")
        if usage:
            self.usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        if not chunk["choices"]:
            return ""
        choice = chunk["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return choice[part].get("content") or ""


class EngineClient:
    """Speaks to one OpenAI server: vLLM, or the router before many.

    Args:
        session: the process's one HTTP session (see `open_session`).
        url: base URL.
        key: what the engine asks for, or None.
        cache_salt: of the tenant.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str | None, cache_salt: str) -> None:
        self._session = session
        self._url = f"{url.rstrip('/')}/v1/chat/completions"
        self._headers = {"Content-Type": "application/json"} | bearer(key)
        self._cache_salt = cache_salt

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineStream]:
        """Start a generation and wait for its first piece; leaving the context before its end aborts it in the engine.

        Raises:
            AdapterMissing: when the engine has no such model.
            InvalidRequest: when the engine refuses the request, e.g. a prompt longer than the context.
            Unavailable: when no engine can be reached.
            EngineFailed: when it answers what makes no sense.
        """
        sent_s = time.perf_counter()
        response = await self._post(request)
        try:
            if response.status != 200:
                raise await _refusal(response, request)
            stream = EngineStream(response.content, sent_s, streamed=request.stream)
            await stream.begin()
            yield stream
            if stream.complete:
                await _drain(response)
        finally:
            response.close()  # at its end the connection is back in the pool already and this does nothing

    async def _post(self, request: EngineRequest) -> aiohttp.ClientResponse:
        body = {
            "model": request.model,
            "messages": request.messages,
            **request.sampling,
            "cache_salt": self._cache_salt,
        }
        if request.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        headers = self._headers | {"X-Request-Id": request.request_id, "X-Session-ID": request.model}
        try:
            return await self._session.post(self._url, data=orjson.dumps(body), headers=headers)
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine gave no answer in time", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            message = "the engine cannot be reached now: send the request again"
            raise Unavailable(message, code="engine_unavailable") from error


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    """The HTTP session for all engines.

    Args:
        timeout_s: longest silence within one answer.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
    )


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries an engine's key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read the few bytes that end the HTTP body, so that the connection can be used again."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            await response.content.read()


def _for_clients(message: str) -> str:
    """What an engine says, without the user adapters in the names of recipes."""
    return _USER_ADAPTER.sub("", message)


async def _refusal(response: aiohttp.ClientResponse, request: EngineRequest) -> MtaError:
    """What an answer other than 200 means."""
    try:
        error = orjson.loads(await response.read())["error"]
        message, param = _for_clients(str(error["message"])), error.get("param")
    except (aiohttp.ClientError, OSError, ValueError, TypeError, KeyError, AttributeError):
        message, param = f"HTTP {response.status} without a reason", None
    status = response.status
    if status == 404 and param == "model":
        return AdapterMissing(message)
    if status in (400, 422):
        too_long = param in _PROMPT_PARAMS
        return InvalidRequest(
            message,
            param=request.prompt_param if too_long or param is None else param,  # a chat template refuses without one
            code="context_length_exceeded" if too_long else None,
        )
    if status in (401, 403):
        return EngineFailed("the engine refused the gateway's key: MTA_ENGINE_KEY differs", code="engine_key")
    if status >= 500 or status == 429:
        return Unavailable(f"the engine cannot answer now: {message}", code="engine_unavailable")
    return EngineFailed(f"the engine answered {status}: {message}")
