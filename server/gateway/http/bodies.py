"""Routes that read JSON bodies with limits on size and time, and parse them strictly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from adapters.errors import excerpt
from server.errors import CLIENT_GONE, TooLarge, TooSlow, Unavailable, WrongMediaType
from server.gateway.http.errors import fault_of
from server.gateway.http.json_text import parse_json, parse_lines
from server.gateway.http.streaming import ClientGone, unless_gone

MAX_BODY_BYTES = 8 << 20
BODY_TIMEOUT_S = 60.0  # for a body to arrive, its wait for a place among the large ones included
HANDLER_TIMEOUT_S = 240.0  # for what follows, up to the response's beginning: checks, waits for an embedder, a commit
LONGEST_WRITE_S = BODY_TIMEOUT_S + HANDLER_TIMEOUT_S  # what a write must know of erasures is kept for longer
SMALL_BYTES = 64 << 10  # maximum size of a body that is parsed on the event loop, which takes a millisecond or two
LARGE_AT_ONCE = 16  # requests with larger bodies; uvicorn stops reading others beyond `SMALL_BYTES`

_LINES = frozenset(("application/x-ndjson", "application/jsonl", "application/jsonlines"))

T = TypeVar("T")


class BodyReader:
    """Reads request bodies; `large` waits for one of the `LARGE_AT_ONCE` places for a large body and holds it.

    A parsed body takes more memory than its bytes, so a request keeps the place as long as the context of `read`.
    """

    def __init__(self, large: Callable[[Request], AbstractAsyncContextManager[None]]) -> None:
        self._large = large
        self._thread = ThreadPoolExecutor(1, "bodies")  # more would only compete with the event loop for the GIL

    @asynccontextmanager
    async def read(self, request: Request, parse: Callable[[bytes], T]) -> AsyncIterator[T]:
        async with AsyncExitStack() as held:
            body = await self._read(request, held)
            if len(body) <= SMALL_BYTES:
                yield parse(body)
            else:
                yield await asyncio.get_running_loop().run_in_executor(self._thread, parse, body)

    async def _read(self, request: Request, held: AsyncExitStack) -> bytes:
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise TooLarge(f"the body has {length} bytes, at most {MAX_BODY_BYTES} are allowed", param="body")
        chunks, size, waiting = [], 0, False
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    small, size = size <= SMALL_BYTES, size + len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise TooLarge(f"the body exceeds the maximum of {MAX_BODY_BYTES} bytes", param="body")
                    if small and size > SMALL_BYTES:
                        waiting = True
                        await held.enter_async_context(self._large(request))
                        waiting = False
                    chunks.append(chunk)
        except TimeoutError:
            if waiting:
                busy = "too many large bodies are being received: try again in a moment"
                raise Unavailable(busy, code="overloaded") from None
            raise TooSlow(
                f"the body did not arrive within {BODY_TIMEOUT_S:g} s: got only {size} bytes", param="body"
            ) from None
        return b"".join(chunks)


class JsonRoute(APIRoute):
    """A FastAPI route whose JSON body is read by the application's `BodyReader`."""

    lines: str | None = None  # field that takes newline-delimited JSON, one value per line
    max_lines = 0

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        if field is None:
            return handle

        async def strict(request: Request) -> Response:
            lines = self._lines_of(request)

            def parse(body: bytes) -> Any:
                value = {lines: parse_lines(body, lines, self.max_lines)} if lines else parse_json(body)
                checked, errors = field.validate(value, loc=("body",))
                if errors:
                    raise fault_of(errors)
                return checked

            await self.before_body(request)
            bodies: BodyReader = request.app.state.bodies
            try:
                async with bodies.read(request, parse) as body, asyncio.timeout(HANDLER_TIMEOUT_S):
                    return await unless_gone(request.receive, handle(_ReadRequest(request, body)))
            except (ClientDisconnect, ClientGone):
                return Response(status_code=CLIENT_GONE)
            except TimeoutError:
                late = f"the request was not done within {HANDLER_TIMEOUT_S:g} s: send it again later"
                raise Unavailable(late, code="overloaded", retry_after_s=30) from None

        return strict

    async def before_body(self, request: Request) -> None:
        """Run before the body is read, for state that must be captured at that moment."""

    def _lines_of(self, request: Request) -> str | None:
        """Return `lines` if the body is newline-delimited; raise `WrongMediaType` if it is compressed or no JSON."""
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            message = f"Content-Encoding must not be set, got {excerpt(coding)}: send the body uncompressed"
            raise WrongMediaType(message, param="content-encoding")
        given = request.headers.get("content-type")
        media_type = (given or "").partition(";")[0].strip().lower()
        if self.lines and media_type in _LINES:
            return self.lines
        if media_type != "application/json" and not (
            media_type.startswith("application/") and media_type.endswith("+json")
        ):
            wanted = "application/json or application/x-ndjson" if self.lines else "application/json"
            raise WrongMediaType(f"Content-Type must be {wanted}, got {excerpt(given)}", param="content-type")
        return None


class _ReadRequest(Request):
    """A request that gives FastAPI the validated body; FastAPI passes a model on unchanged."""

    def __init__(self, request: Request, body: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._read = body

    async def body(self) -> Any:
        return self._read

    json = body  # which FastAPI calls as well if the content type is JSON
