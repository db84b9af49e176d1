"""The client for generations: OpenAI's chat completions and completions over HTTP.

Closing the connection tells vLLM to abort. Every failure becomes one of our errors, here or in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from adapters.errors import MtaError
from server.engine_protocol import key_header
from server.errors import ApiError, EngineFailed, InvalidRequest, Unavailable
from server.gateway.engines.stream import BrokeOff, EngineStream, for_clients
from server.gateway.engines.ways import Way, Ways

log = logging.getLogger("mta.gateway")

_KEEP_ALIVE_S = 4.0  # below vLLM's own 5 s: a connection is never reused while the engine closes it
_CONNECT_TIMEOUT_S = 3.0
_DRAIN_TIMEOUT_S = 1.0
_NOT_REACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_NO_ENGINE = b"No available workers"  # says vllm-router where it has asked none, since it trusts none just now
_MOST_SENDINGS = 2  # more would carry a request that kills engines through the fleet
_PROMPT_PARAMS = frozenset(("input_tokens", "input_text", "prompt", "messages"))
_INTRICATE = frozenset(("n", "logprobs", "logit_bias", "response_format", "tools", "tool_choice"))
"""Fields that may be at fault where the engine names none; without them it is its chat template that refuses."""

Conversation = list[dict[str, Any]]
"""Messages in OpenAI's shape; `content` is a text, or absent beside tool calls."""
Prompt = str | list[str] | list[int] | list[list[int]]
"""One text or several, or their token ids."""


class NotTaken(Unavailable):
    """No engine has the request, on this way: it can be sent on any other."""


class AdapterMissing(MtaError):
    """The engine cannot serve the model it was asked for: another bank, an unknown anchor, a lost user adapter."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation.

    Attributes:
        request_id: also the engine's id for it, so that logs can be joined.
        model: a recipe name, or `base`.
        messages: the conversation, where there is no prompt.
        sampling: fields passed on as they are, e.g. max_tokens.
        prompt_param: the client's name for the conversation, for errors: `prompt` or `messages`.
        stream: whether the answer comes in pieces.
        prompt: continued as it is.
        cache_salt: the tenant's: what the prefix cache holds of other tenants' prompts speeds nothing up.
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
        session: the process's one HTTP session (see `open_session`).
        ways: to the engine, or to several.
        key: the key they require, or None.
        retried: called whenever a request is sent a second time.
    """

    def __init__(
        self, session: aiohttp.ClientSession, ways: Ways, key: str | None, retried: Callable[[], None] = lambda: None
    ) -> None:
        self._session = session
        self._ways = ways
        self._headers = {"Content-Type": "application/json"} | key_header(key)
        self._retried = retried

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineStream]:
        """Start a generation and wait for its first piece; leaving the context early aborts it in the engine.

        If no piece comes because an engine cannot be reached, or breaks off, it is sent once more, on another way.

        Raises:
            AdapterMissing: when the engine has no such model.
            InvalidRequest: when the engine refuses the request, e.g. a prompt longer than the context.
            Unavailable: when no engine can be reached.
            EngineFailed: when its answer makes no sense.
        """
        async with AsyncExitStack() as stack:
            yield await self._begun(request, stack)

    async def _begun(self, request: EngineRequest, stack: AsyncExitStack) -> EngineStream:
        """The answer on the first way on which one begins, of at most two on which the request could be sent."""
        failure: ApiError | None = None
        silent, sent = set(), 0
        for way in self._ways.to(request.model):
            if way.url in silent:
                continue
            if failure:
                log.warning("%s is sent on another way: %s", request.request_id, failure.explained)
                self._retried()
            try:
                return await stack.enter_async_context(self._sent(request, way))
            except (Unavailable, BrokeOff) as error:
                failure = error
            if isinstance(failure, NotTaken) or (isinstance(failure, Unavailable) and failure.__cause__):
                silent.add(way.url)  # not a byte came from there, or from any engine behind it
            sent += not isinstance(failure, NotTaken)
            if sent == _MOST_SENDINGS:
                break
        assert failure
        raise failure

    @asynccontextmanager
    async def _sent(self, request: EngineRequest, way: Way) -> AsyncIterator[EngineStream]:
        sent_s = time.perf_counter()
        response = await self._post(request, way)
        try:
            if response.status != 200:
                raise await _refusal(response, request)
            stream = EngineStream(response.content, sent_s, streamed=request.stream, chat=request.prompt is None)
            await stream.begin()
            yield stream
            if stream.complete:
                await _drain(response)
        finally:
            response.close()  # after a whole answer the connection is back in the pool, and this does nothing

    async def _post(self, request: EngineRequest, way: Way) -> aiohttp.ClientResponse:
        said = {"messages": request.messages} if request.prompt is None else {"prompt": request.prompt}
        url = f"{way.url}/v1/{'chat/completions' if request.prompt is None else 'completions'}"
        body = {"model": request.model, **said, **request.sampling, "cache_salt": request.cache_salt}
        if request.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        headers = self._headers | {"X-Request-Id": request.request_id, "X-Session-ID": way.session}
        try:
            return await self._session.post(url, data=orjson.dumps(body), headers=headers)
        except aiohttp.SocketTimeoutError as error:
            raise EngineFailed("the engine did not answer in time", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            message = "the engine cannot be reached now: send the request again"
            kind = NotTaken if isinstance(error, _NOT_REACHED) else Unavailable
            raise kind(message, code="engine_unavailable") from error


def open_session(timeout_s: float, **options: Any) -> aiohttp.ClientSession:
    """The HTTP session for all engines.

    Args:
        timeout_s: longest silence within one answer.
        options: more of aiohttp's.
    """
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
        return InvalidRequest(
            message,
            param=param,
            code="context_length_exceeded" if too_long else None,
        )
    if status in (401, 403):
        return EngineFailed("the engine refused the gateway's key: MTA_ENGINE_KEY differs", code="engine_key")
    if status == 503 and _NO_ENGINE in said:
        return NotTaken("no engine can be reached now: send the request again", code="engine_unavailable")
    if status >= 500 or status == 429:
        return Unavailable(f"the engine cannot answer now: {message}", code="engine_unavailable")
    return EngineFailed(f"the engine answered {status}: {message}")
