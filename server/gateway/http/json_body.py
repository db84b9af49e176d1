"""Routes whose JSON bodies are read, parsed and validated by our own rules."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from adapters.errors import excerpt
from server.errors import WrongMediaType
from server.gateway.http.bodies import BodyReader
from server.gateway.http.errors import fault_of
from server.gateway.http.json_text import parse_json, parse_lines
from server.gateway.http.middleware import CLIENT_GONE
from server.store.samples import MAX_SAMPLES

_LINES = frozenset(("application/x-ndjson", "application/jsonl", "application/jsonlines"))


class JsonRoute(APIRoute):
    """A FastAPI route whose JSON body is read by a `BodyReader`.

    Attributes:
        lines: the field that newline-delimited JSON fills, one value per line; None if a body must be one value.
    """

    lines: str | None = None
    most_lines = 0

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        if field is None:
            return handle

        def valid(value: Any) -> Any:
            checked, errors = field.validate(value, loc=("body",))
            if errors:
                raise fault_of(errors)
            return checked

        def of_json(body: bytes) -> Any:
            return valid(parse_json(body))

        def of_lines(body: bytes) -> Any:
            assert self.lines
            return valid({self.lines: parse_lines(body, self.lines, self.most_lines)})

        async def strict(request: Request) -> Response:
            in_lines = self.lines is not None and _media_type(request) in _LINES
            if not in_lines:
                _check_media_type(request, self.lines is not None)
            await self.accepted(request)
            bodies: BodyReader = request.app.state.gateway.bodies
            try:
                body = await bodies.read(request, of_lines if in_lines else of_json)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            return await handle(_ReadRequest(request, body))

        return strict

    async def accepted(self, request: Request) -> None:
        """Called when all of a request but its body is there: for what must be known of that moment."""


class SamplesRoute(JsonRoute):
    """The same, for bodies with samples."""

    lines = "samples"
    most_lines = MAX_SAMPLES


class _ReadRequest(Request):
    """A request that hands FastAPI the body as validated here; FastAPI passes a model on unchanged."""

    def __init__(self, request: Request, body: Any) -> None:
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        headers.append((b"content-type", b"application/json"))  # FastAPI accepts a parsed body only of this type
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._read = body

    async def body(self) -> bytes:
        return b"{}"  # already read, but not empty

    async def json(self) -> Any:
        return self._read


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_media_type(request: Request, lines: bool) -> None:
    media_type = _media_type(request)
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        wanted = "application/json or application/x-ndjson" if lines else "application/json"
        given = request.headers.get("content-type")
        raise WrongMediaType(f"Content-Type must be {wanted}, got {excerpt(given)}", param="content-type")
