"""Client for generations: OpenAI's chat completions and completions over HTTP, streamed or whole.

Closing the connection makes vLLM abort the request. This module converts every failure to an error of `server.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import orjson

from adapters.errors import MtaError, excerpt
from bank.lookup.phrases import NO_PHRASES, Reader, TrustedPhrases
from server.engine_protocol import key_header, phrase_arguments
from server.errors import EngineFailed, InvalidRequest, Unavailable
from server.gateway.engines.admin import Engines

log = logging.getLogger("mta.gateway")

_KEEP_ALIVE_S = 4.0  # below vLLM's default of 5 s, so that no connection is reused while the engine closes it
_CONNECT_TIMEOUT_S = 3.0
_DRAIN_TIMEOUT_S = 1.0
_CONNECT_ERRORS = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_NO_HEALTHY_ENGINE = b"No available workers"  # vllm-router's response when it forwarded the request to no engine
_MAX_SENDS = 2  # a higher limit would let one request crash engine after engine
_MAX_DIRECT = 2  # maximum number of engines tried without the router
_PROMPT_PARAMS = frozenset(("input_tokens", "input_text", "prompt", "messages"))
_ERROR_PRONE_FIELDS = frozenset(
    ("n", "logprobs", "logit_bias", "response_format", "structured_outputs", "tools", "tool_choice")
)
"""Fields that may cause an error without a `param`; if all are absent, the chat template rejected the prompt."""
_ABORTED = "abort"  # finish reason of an answer that vLLM aborts, e.g. during shutdown
_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")  # after an even number of backslashes
_USER_ADAPTER = re.compile(r":u-[a-z2-7.]*")  # in a recipe's name; it contains the user's key

Conversation = list[dict[str, Any]]
"""Messages in OpenAI's format; `content` is a text, or missing if there are tool calls."""
Prompt = str | list[str] | list[int] | list[list[int]]
"""One or several prompts, as texts or token ids."""
Piece = tuple[str, dict[str, Any]]
"""Text of the first choice (often empty) and the JSON value that contained it."""


MOVED = "moved"  # added to a choice: the number of its tokens that a phrase had proposed


class AdapterMissing(MtaError):
    """The engine cannot serve the requested model: another bank, an unknown anchor or a lost user adapter."""


class EngineUnavailable(Unavailable):
    """One address does not answer; another one may."""

    def __init__(self, message: str, *, received: bool, silent: bool) -> None:
        super().__init__(message, code="engine_unavailable")
        self.received = received  # whether an engine may have received the request
        self.silent = silent  # whether neither the address nor an engine behind it responded


class AnswerInterrupted(EngineFailed):
    """The engine stopped or aborted before the answer was complete."""

    received, silent = True, False  # as in `EngineUnavailable`

    def __init__(self) -> None:
        super().__init__("the engine stopped in the middle of the answer: send the request again")


class ErrorEvent(EngineFailed):
    def __init__(self, error: Any) -> None:
        shown = _USER_ADAPTER.sub("", excerpt(error, 300))
        super().__init__(f"the engine failed in the middle of the answer: {shown}")
        self.error = error if isinstance(error, dict) else {}


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation. If set, `prompt` replaces `messages` and is continued verbatim, without a chat template."""

    request_id: str  # the engine uses the same id, so that logs can be joined
    model: str  # recipe name or `base`
    messages: Conversation
    sampling: Mapping[str, Any]  # fields passed on unchanged
    prompt_param: str  # field name of the conversation in error messages
    cache_salt: str  # per tenant, so that tenants do not share the prefix cache
    stream: bool = True
    prompt: Prompt | None = None
    phrases: TrustedPhrases = NO_PHRASES  # the user's, to be mixed in


@dataclass
class EngineClient:
    """Sends generations to one OpenAI server (vLLM or a router); if that fails, directly to the `engines`."""

    session: aiohttp.ClientSession
    url: str
    engines: Engines
    key: str | None
    retried: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | key_header(self.key)

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineStream]:
        """Start a generation and wait for its first piece; leaving the context early aborts it in the engine.

        If an engine cannot be reached or stops before the first piece, resend the request once on another route. Raise
        `AdapterMissing` if the engine cannot serve the model, and `InvalidRequest` if it refuses the request.
        """
        stream, response = await self._send_with_retry(request)
        try:
            yield stream
            if stream.complete:  # read the rest of the body, so that the connection can be reused
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                        await response.content.read()
        finally:
            response.close()  # no effect after a complete answer: the connection is back in the pool

    async def _send_with_retry(self, request: EngineRequest) -> tuple[EngineStream, aiohttp.ClientResponse]:
        """Return the answer of the first route that works; let at most two routes reach an engine."""
        failure: EngineUnavailable | AnswerInterrupted | None = None
        silent, sent = set(), 0
        for url, session_id in self._routes(request.model):
            if url in silent:
                continue
            if failure:
                log.warning("retrying %s on another route: %s", request.request_id, failure.explained)
                self.retried()
            try:
                return await self._send(request, url, session_id)
            except (EngineUnavailable, AnswerInterrupted) as error:
                failure = error
            if failure.silent:
                silent.add(url)
            sent += failure.received
            if sent == _MAX_SENDS:
                break
        assert failure
        raise failure

    def _routes(self, model: str) -> Iterator[tuple[str, str]]:
        """Yield pairs of base URL and session id, best first.

        A router maps a session id to an engine, so another session id usually selects another engine. If the router
        cannot be reached or has no healthy engine, the engines are called directly.
        """
        yield self.url, model
        if self.url not in self.engines.urls:
            yield self.url, f"{model}~"
        yield from [(url, model) for url in self.engines.by_preference(model) if url != self.url][:_MAX_DIRECT]

    async def _send(
        self, request: EngineRequest, url: str, session_id: str
    ) -> tuple[EngineStream, aiohttp.ClientResponse]:
        body = {"model": request.model, **request.sampling, "cache_salt": request.cache_salt}
        if request.prompt is None:
            path, body["messages"] = "/v1/chat/completions", request.messages
        else:
            path, body["prompt"] = "/v1/completions", request.prompt
        if request.phrases:  # the ids tell which of the answer's tokens the table had proposed
            body |= {"vllm_xargs": phrase_arguments(request.phrases), "return_token_ids": True}
        if request.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        headers = self._headers | {"X-Request-Id": request.request_id, "X-Session-ID": session_id}
        sent_s = time.perf_counter()
        try:
            response = await self.session.post(url + path, data=orjson.dumps(body), headers=headers)
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine did not answer in time", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            message = "the engine cannot be reached now: send the request again"
            raise EngineUnavailable(message, received=not isinstance(error, _CONNECT_ERRORS), silent=True) from error
        try:
            if response.status != 200:
                raise await _error_from(response, request)
            stream = EngineStream(response.content, sent_s, request)
            try:
                await stream.begin()
            except ErrorEvent as event:  # vLLM answers 200 before it looks at the request
                raise _error_of(int(event.error.get("code") or 500), event.error, request) from None
        except BaseException:
            response.close()
            raise
        return stream, response


class EngineStream:
    """An answer in progress: call `begin`, then iterate over the pieces; all attributes are complete at the end.

    If streamed, every chunk reports the prompt's length before any text is passed on. A whole answer reports it only at
    the end, but saves the cost of chunks, which for a small model is a large part of an answer's time. Iterating raises
    `EngineFailed` if the engine stops early or sends something that is not an answer.
    """

    def __init__(self, chunks: aiohttp.StreamReader, sent_s: float, request: EngineRequest) -> None:
        self.sent_s = sent_s  # time of sending by the performance counter
        self.first_token_s: float | None = None  # None if the answer is not streamed
        self.prompt_tokens: int | None = None  # None if the first piece does not report it
        self.finish_reason: str | None = None  # OpenAI's reason for the first choice
        self.usage: dict[str, int] = {}
        self.moved = 0  # number of tokens that a phrase had proposed
        self.complete = False
        self._readers = defaultdict[int, Reader](lambda: Reader(request.phrases.table))  # by choice
        self._streamed = request.stream
        self._answers = request.sampling.get("n") or 1  # to each prompt
        self._prompts, self._written = dict[int, int](), dict[int, int]()  # tokens of each prompt, of each answer
        self._field = "text" if request.prompt is not None else "delta" if request.stream else "message"
        self._values = events(chunks) if request.stream else _single_value(chunks)
        self._first: Piece | None = None

    async def begin(self) -> None:
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
            raise EngineFailed("the engine stopped responding during the answer", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError, EOFError) as error:
            raise AnswerInterrupted from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise EngineFailed("the engine sent something that is not a completion") from error

    def _read(self, chunk: dict[str, Any]) -> str:
        if "error" in chunk:
            raise ErrorEvent(chunk["error"])
        choices = chunk["choices"]
        if usage := chunk.get("usage"):
            self._count(usage, choices)
        if not choices:
            return ""
        for choice in choices:
            if ids := choice.pop("token_ids", None):
                choice[MOVED] = sum(map(self._readers[choice["index"]].read, ids))
                self.moved += choice[MOVED]
        if any(choice.get("finish_reason") == _ABORTED for choice in choices):
            raise AnswerInterrupted
        self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
        content = choices[0][self._field]
        return (content if self._field == "text" else content.get("content")) or ""

    def _count(self, usage: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> None:
        prompt, written = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        if self._streamed and choices:  # of this answer and its prompt alone; what follows the last answer has the sums
            index = int(choices[0]["index"])
            self._prompts[index // self._answers], self._written[index] = prompt, written
            prompt, written = sum(self._prompts.values()), sum(self._written.values())
        self.usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def events(chunks: aiohttp.StreamReader) -> AsyncGenerator[Any, None]:
    """Yield the JSON values of server-sent events; raise `EOFError` if the stream ends without `[DONE]`."""
    rest = b""
    async for chunk in chunks.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield _parsed(data)
    raise EOFError("the stream ended without [DONE]")


async def _single_value(chunks: aiohttp.StreamReader) -> AsyncGenerator[Any, None]:
    yield _parsed(await chunks.read())


def _parsed(data: bytes) -> Any:
    """Parse an engine's JSON, with U+FFFD in place of NUL: requests must not have it, so no answer may."""
    return orjson.loads(_NUL.sub(rb"\1\\ufffd", data) if rb"\u0000" in data else data)


def open_session(timeout_s: float, **options: Any) -> aiohttp.ClientSession:
    """Open the HTTP session for all engines; `timeout_s` is the longest pause within one answer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        **options,
    )


async def _error_from(response: aiohttp.ClientResponse, request: EngineRequest) -> MtaError:
    body, error = b"", None
    with contextlib.suppress(aiohttp.ClientError, OSError, ValueError, TypeError, KeyError):
        body = await response.read()
        error = orjson.loads(body)["error"]
    if response.status == 503 and _NO_HEALTHY_ENGINE in body:
        return EngineUnavailable("no engine can be reached now: send the request again", received=False, silent=True)
    return _error_of(response.status, error, request)


def _error_of(status: int, error: Any, request: EngineRequest) -> MtaError:
    """Translate an engine's error, which is one in OpenAI's shape if the engine could answer."""
    try:
        message, param = _USER_ADAPTER.sub("", str(error["message"])), error.get("param")
        param = param and str(param).removeprefix("body.")
    except (TypeError, KeyError, AttributeError):
        message, param = f"HTTP {status} without a reason", None
    if status == 404 and param == "model":
        return AdapterMissing(message)
    if status in (400, 422) and "--tool-call-parser" in message:
        remedy = 'start it with MTA_TOOL_PARSER, vLLM\'s name for this model\'s calls, or send "tool_choice": "none"'
        return InvalidRequest(f"the engine cannot read tool calls: {remedy}", param="tools", code="no_tool_parser")
    if status in (400, 422):
        too_long = param in _PROMPT_PARAMS
        if too_long or (param is None and _ERROR_PRONE_FIELDS.isdisjoint(request.sampling)):
            param = request.prompt_param
        return InvalidRequest(message, param=param, code="context_length_exceeded" if too_long else None)
    if status in (401, 403):
        return EngineFailed("the engine refused the gateway's key: MTA_ENGINE_KEY differs", code="engine_key")
    if status >= 500 or status == 429:
        return EngineUnavailable(f"the engine cannot answer now: {message}", received=True, silent=False)
    return EngineFailed(f"the engine answered {status}: {message}")
