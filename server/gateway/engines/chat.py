"""The client for generations: OpenAI's chat completions and completions over HTTP.

Closing the connection tells vLLM to abort. Every failure becomes one of our errors, here or in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from adapters.errors import MtaError
from server.engine_protocol import key_header
from server.errors import EngineFailed, InvalidRequest, Unavailable
from server.gateway.engines.admin import Engines
from server.gateway.engines.stream import BrokeOff, EngineStream, for_clients

log = logging.getLogger("mta.gateway")

_KEEP_ALIVE_S = 4.0  # below vLLM's own 5 s: a connection is never reused while the engine closes it
_CONNECT_TIMEOUT_S = 3.0
_DRAIN_TIMEOUT_S = 1.0
_NOT_REACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_NO_ENGINE = b"No available workers"  # says vllm-router where it has asked none, since it trusts none just now
_MOST_SENDINGS = 2  # more would carry a request that kills engines through the fleet
_MOST_DIRECT = 2
"""Engines that are asked directly, one after the other."""
_PROMPT_PARAMS = frozenset(("input_tokens", "input_text", "prompt", "messages"))
_INTRICATE = frozenset(("n", "logprobs", "logit_bias", "response_format", "tools", "tool_choice"))
"""Fields that may be at fault where the engine names none; without them it is its chat template that refuses."""

Conversation = list[dict[str, Any]]
"""Messages in OpenAI's shape; `content` is a text, or absent beside tool calls."""
Prompt = str | list[str] | list[int] | list[list[int]]
"""One text or several, or their token ids."""


class AdapterMissing(MtaError):
    """The engine cannot serve the model it was asked for: another bank, an unknown anchor, a lost user adapter."""


class EngineUnavailable(Unavailable):
    """No answer comes from one address; another may have one.

    Attributes:
        received: whether an engine may have got the request.
        silent: whether not a byte came from that address, or from any engine behind it.
    """

    def __init__(self, message: str, *, received: bool, silent: bool) -> None:
        super().__init__(message, code="engine_unavailable")
        self.received = received
        self.silent = silent


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation.

    Attributes:
        request_id: also the engine's id for it, so that logs can be joined.
        model: a recipe name, or `base`.
        sampling: fields passed on as they are, e.g. max_tokens.
        prompt_param: the client's name for the conversation, for errors: `prompt` or `messages`.
        cache_salt: the tenant's: what the prefix cache holds of other tenants' prompts speeds nothing up.
        prompt: continued as it is, without a chat template, instead of `messages`.
    """

    request_id: str
    model: str
    messages: Conversation
    sampling: Mapping[str, Any]
    prompt_param: str
    cache_salt: str
    stream: bool = True
    prompt: Prompt | None = None


class EngineClient:
    """Speaks to one OpenAI server: vLLM, or the router in front of several.

    Args:
        url: base URL of an engine, or of the router.
        engines: all of them; where the router fails they are asked directly.
        retried: called whenever a request is sent a second time.
    """

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
            if stream.complete:
                await _drain(response)
        finally:
            response.close()  # after a whole answer the connection is back in the pool, and this does nothing

    async def _begin(self, request: EngineRequest) -> tuple[EngineStream, aiohttp.ClientResponse]:
        """The answer on the first route on which one begins, of at most two on which an engine may have the request."""
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

        A router sends the same session to the same engine. Another session leads elsewhere, unless by chance it does
        not; and where the router cannot be reached, or trusts no engine, engines can be asked directly.
        """
        yield self._url, model
        if self._url not in self._engines.urls:
            yield self._url, f"{model}~"
        yield from [(url, model) for url in self._engines.by_preference(model) if url != self._url][:_MOST_DIRECT]

    async def _send(
        self, request: EngineRequest, url: str, session_id: str
    ) -> tuple[EngineStream, aiohttp.ClientResponse]:
        sent_s = time.perf_counter()
        response = await self._post(request, url, session_id)
        try:
            if response.status != 200:
                raise await _refusal(response, request)
            stream = EngineStream(response.content, sent_s, streamed=request.stream, chat=request.prompt is None)
            await stream.begin()
        except BaseException:
            response.close()
            raise
        return stream, response

    async def _post(self, request: EngineRequest, url: str, session_id: str) -> aiohttp.ClientResponse:
        body = {"model": request.model, **request.sampling, "cache_salt": request.cache_salt}
        if request.prompt is None:
            path, body["messages"] = "/v1/chat/completions", request.messages
        else:
            path, body["prompt"] = "/v1/completions", request.prompt
        if request.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        headers = self._headers | {"X-Request-Id": request.request_id, "X-Session-ID": session_id}
        try:
            return await self._session.post(url + path, data=orjson.dumps(body), headers=headers)
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine did not answer in time", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            message = "the engine cannot be reached now: send the request again"
            raise EngineUnavailable(message, received=not isinstance(error, _NOT_REACHED), silent=True) from error


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


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read the few bytes that end the HTTP body, so that the connection can be used again."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            await response.content.read()


async def _refusal(response: aiohttp.ClientResponse, request: EngineRequest) -> MtaError:
    """The error that a status other than 200 means."""
    said = b""
    try:
        said = await response.read()
        error = orjson.loads(said)["error"]
        message, param = for_clients(str(error["message"])), error.get("param")
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
