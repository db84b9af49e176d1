"""The client for generations: OpenAI's chat completions and completions over HTTP, streamed or whole.

Closing the connection tells vLLM to abort. Every failure becomes one of our errors here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import orjson

from adapters.errors import MtaError, excerpt
from server.engine_protocol import key_header
from server.errors import EngineFailed, InvalidRequest, Unavailable
from server.gateway.engines.admin import Engines

log = logging.getLogger("mta.gateway")

_KEEP_ALIVE_S = 4.0  # below vLLM's own 5 s: a connection is never reused while the engine closes it
_CONNECT_TIMEOUT_S = 3.0
_DRAIN_TIMEOUT_S = 1.0
_NOT_REACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_NO_ENGINE = b"No available workers"  # vllm-router's answer while it trusts no engine, and so has asked none
_MOST_SENDINGS = 2  # more would carry a request that kills engines through the fleet
_MOST_DIRECT = 2  # engines that are asked directly, one after the other
_PROMPT_PARAMS = frozenset(("input_tokens", "input_text", "prompt", "messages"))
_INTRICATE = frozenset(("n", "logprobs", "logit_bias", "response_format", "tools", "tool_choice"))
"""Fields that may be at fault where the engine names none; without them it is its chat template that refuses."""
_ABORTED = "abort"  # the finish reason of an answer that vLLM gives up, e.g. when it is stopped
_USER_ADAPTER = re.compile(r":u-[a-z2-7.]*")

Conversation = list[dict[str, Any]]
"""Messages in OpenAI's shape; `content` is a text, or absent beside tool calls."""
Prompt = str | list[str] | list[int] | list[list[int]]
"""One text or several, or their token ids."""
Piece = tuple[str, dict[str, Any]]
"""The text of the first choice, often empty, and the JSON value that it came in."""


class AdapterMissing(MtaError):
    """The engine cannot serve the model it was asked for: another bank, an unknown anchor, a lost user adapter."""


class EngineUnavailable(Unavailable):
    """No answer comes from one address; another may have one."""

    def __init__(self, message: str, *, received: bool, silent: bool) -> None:
        super().__init__(message, code="engine_unavailable")
        self.received = received  # an engine may have got the request
        self.silent = silent  # not a byte came from the address, or from any engine behind it


class BrokeOff(EngineFailed):
    """The engine ended before the answer did, or gave it up."""

    received, silent = True, False  # as of `EngineUnavailable`

    def __init__(self) -> None:
        super().__init__("the engine broke off in the middle of the answer: send the request again")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation; `prompt` is continued as it is, without a chat template, instead of `messages`."""

    request_id: str  # also the engine's, so that logs can be joined
    model: str  # a recipe's name, or `base`
    messages: Conversation
    sampling: Mapping[str, Any]  # fields passed on as they are
    prompt_param: str  # the client's name for the conversation, for errors
    cache_salt: str  # the tenant's: no prompt profits from another tenant's in the prefix cache
    stream: bool = True
    prompt: Prompt | None = None


class EngineClient:
    """Speaks to one OpenAI server, vLLM or a router; where that fails, it asks the `engines` directly."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        engines: Engines,
        key: str | None,
        retried: Callable[[], None] = lambda: None,
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._engines = engines
        self._headers = {"Content-Type": "application/json"} | key_header(key)
        self._retried = retried

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineStream]:
        """Start a generation and wait for its first piece; leaving the context early aborts it in the engine.

        If no piece comes because an engine cannot be reached, or breaks off, it is sent once more, on another route.

        Raises:
            AdapterMissing: when the engine has no such model.
            InvalidRequest: when the engine refuses the request, e.g. a prompt longer than the context.
            Unavailable: when no engine can be reached.
            EngineFailed: when its answer makes no sense.
        """
        stream, response = await self._begin(request)
        try:
            yield stream
            if stream.complete:  # read the few bytes that end the body, so that the connection can be used again
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                        await response.content.read()
        finally:
            response.close()  # after a whole answer the connection is back in the pool, and this does nothing

    async def _begin(self, request: EngineRequest) -> tuple[EngineStream, aiohttp.ClientResponse]:
        """The answer by the first route that works; at most two routes may hand the request to an engine."""
        failure: EngineUnavailable | BrokeOff | None = None
        silent, sent = set(), 0
        for url, session_id in self._routes(request.model):
            if url in silent:
                continue
            if failure:
                log.warning("%s is sent on another route: %s", request.request_id, failure.explained)
                self._retried()
            try:
                return await self._send(request, url, session_id)
            except (EngineUnavailable, BrokeOff) as error:
                failure = error
            if failure.silent:
                silent.add(url)
            sent += failure.received
            if sent == _MOST_SENDINGS:
                break
        assert failure
        raise failure

    def _routes(self, model: str) -> Iterator[tuple[str, str]]:
        """Base URLs with the session ids that a router finds an engine by; best first.

        A router sends the same session to the same engine. Another session usually leads to another engine; where the
        router cannot be reached, or trusts no engine, engines can be asked directly.
        """
        yield self._url, model
        if self._url not in self._engines.urls:
            yield self._url, f"{model}~"
        yield from [(url, model) for url in self._engines.by_preference(model) if url != self._url][:_MOST_DIRECT]

    async def _send(
        self, request: EngineRequest, url: str, session_id: str
    ) -> tuple[EngineStream, aiohttp.ClientResponse]:
        body = {"model": request.model, **request.sampling, "cache_salt": request.cache_salt}
        if request.prompt is None:
            path, body["messages"] = "/v1/chat/completions", request.messages
        else:
            path, body["prompt"] = "/v1/completions", request.prompt
        if request.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        headers = self._headers | {"X-Request-Id": request.request_id, "X-Session-ID": session_id}
        sent_s = time.perf_counter()
        try:
            response = await self._session.post(url + path, data=orjson.dumps(body), headers=headers)
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine did not answer in time", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            message = "the engine cannot be reached now: send the request again"
            raise EngineUnavailable(message, received=not isinstance(error, _NOT_REACHED), silent=True) from error
        try:
            if response.status != 200:
                raise await _refusal(response, request)
            stream = EngineStream(response.content, sent_s, streamed=request.stream, chat=request.prompt is None)
            await stream.begin()
        except BaseException:
            response.close()
            raise
        return stream, response


class EngineStream:
    """An answer in progress: call `begin`, then iterate over its pieces; everything is known when they end.

    Streamed, the usage in every chunk tells the prompt's length before anything is passed on. Whole, it is known only
    at the end, but neither side spends time on chunks, which for a small model is much of an answer's time.

    Iterating raises `EngineFailed` when the engine breaks off, or sends something that is not an answer.
    """

    def __init__(
        self, chunks: aiohttp.StreamReader, sent_s: float, *, streamed: bool = True, chat: bool = True
    ) -> None:
        self.sent_s = sent_s  # by the performance counter
        self.first_token_s: float | None = None  # stays None when the answer comes whole
        self.prompt_tokens: int | None = None  # None if the engine does not report it with the first piece
        self.finish_reason: str | None = None  # OpenAI's, of the first choice
        self.usage: dict[str, int] = {}
        self.complete = False
        self._streamed = streamed
        self._field = ("delta" if streamed else "message") if chat else "text"
        self._values = events(chunks) if streamed else _whole(chunks)
        self._first: Piece | None = None

    async def begin(self) -> None:
        """Wait for the first piece."""
        with contextlib.suppress(StopAsyncIteration):
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
            message = _for_clients(excerpt(chunk["error"], 300))
            raise EngineFailed(f"the engine failed in the middle of the answer: {message}")
        if usage := chunk.get("usage"):
            self.usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        choices = chunk["choices"]
        if not choices:
            return ""
        if any(choice.get("finish_reason") == _ABORTED for choice in choices):
            raise BrokeOff
        self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
        said = choices[0][self._field]
        return (said if self._field == "text" else said.get("content")) or ""


async def events(chunks: aiohttp.StreamReader) -> AsyncGenerator[Any, None]:
    """The JSON values of a stream of server-sent events, up to `[DONE]`; comments and empty lines are skipped.

    Raises:
        ValueError: when an event is not JSON.
        EOFError: when the stream ends without `[DONE]`.
    """
    rest = b""
    async for chunk in chunks.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield orjson.loads(data)
    raise EOFError("the stream ended without [DONE]")


async def _whole(chunks: aiohttp.StreamReader) -> AsyncGenerator[Any, None]:
    yield orjson.loads(await chunks.read())


def open_session(timeout_s: float, **options: Any) -> aiohttp.ClientSession:
    """The HTTP session for all engines: `timeout_s` is the longest silence within one answer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        **options,
    )


async def _refusal(response: aiohttp.ClientResponse, request: EngineRequest) -> MtaError:
    """The error that a status other than 200 means."""
    said = b""
    try:
        said = await response.read()
        error = orjson.loads(said)["error"]
        message, param = _for_clients(str(error["message"])), error.get("param")
        param = param and str(param).removeprefix("body.")
    except (aiohttp.ClientError, OSError, ValueError, TypeError, KeyError, AttributeError):
        message, param = f"HTTP {response.status} without a reason", None
    status = response.status
    if status == 404 and param == "model":
        return AdapterMissing(message)
    if status in (400, 422):
        too_long = param in _PROMPT_PARAMS
        if too_long or (param is None and _INTRICATE.isdisjoint(request.sampling)):
            param = request.prompt_param
        return InvalidRequest(message, param=param, code="context_length_exceeded" if too_long else None)
    if status in (401, 403):
        return EngineFailed("the engine refused the gateway's key: MTA_ENGINE_KEY differs", code="engine_key")
    if status == 503 and _NO_ENGINE in said:
        return EngineUnavailable("no engine can be reached now: send the request again", received=False, silent=True)
    if status >= 500 or status == 429:
        return EngineUnavailable(f"the engine cannot answer now: {message}", received=True, silent=False)
    return EngineFailed(f"the engine answered {status}: {message}")


def _for_clients(message: str) -> str:
    """An engine's message, without the user adapters in recipe names: they hold users' keys."""
    return _USER_ADAPTER.sub("", message)
