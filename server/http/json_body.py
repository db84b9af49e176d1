"""Request bodies: read up to a limit and parsed strictly, so that what is refused can be named.

JSON has no NaN and no Infinity, and text has no NUL and no lone surrogates; Python's reader lets all four through.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from adapters.errors import excerpt
from server.errors import InvalidRequest, TooLarge, WrongMediaType
from server.parts import parts_of

_LINES = frozenset(("application/x-ndjson", "application/jsonl", "application/jsonlines"))
_NUL_ESCAPE = b"\\u0000"
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # an even number of backslashes before it are themselves escaped
_MOST_LEAVES = 100_000


class JsonRoute(APIRoute):
    """A FastAPI route whose JSON body has been read by this module's rules.

    Attributes:
        lines: the field that newline-delimited JSON fills, one value a line; None where a body is one value.
    """

    lines: str | None = None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def strict(request: Request) -> Response:
            in_lines = self.lines is not None and _media_type(request) in _LINES
            if not in_lines:
                _check_media_type(request, self.lines is not None)
            body = await _read(request, parts_of(request).settings.max_body_bytes)
            parsed = {self.lines: parse_lines(body, str(self.lines))} if in_lines else parse_json(body)
            return await handle(_ParsedRequest(request, body, parsed))

        return strict


class SamplesRoute(JsonRoute):
    """The same, for bodies of samples."""

    lines = "samples"


class _ParsedRequest(Request):
    """A request that hands FastAPI the body as it was parsed here."""

    def __init__(self, request: Request, body: bytes, parsed: Any) -> None:
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        headers.append((b"content-type", b"application/json"))  # FastAPI takes a parsed body of this type alone
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._bytes = body
        self._parsed = parsed

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._parsed


def parse_json(body: bytes) -> Any:
    """The value of a JSON text, nested at most 200 deep.

    Raises:
        InvalidRequest: when it is none, or holds what no field takes; `param` names the place where it is known.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _fault(body, str(error)) from error
    if _NUL_ESCAPE in body and _NUL.search(body):
        _refuse_impossible(value)
        raise InvalidRequest("the body holds NUL, which no text has", param="body")
    return value


def parse_lines(body: bytes, field: str) -> list[Any]:
    """The values of newline-delimited JSON; empty lines are passed over.

    Raises:
        InvalidRequest: naming the line's place in `field`.
    """
    values = []
    for line in body.splitlines():
        if not line.strip():
            continue
        try:
            values.append(parse_json(line))
        except InvalidRequest as error:
            place = f"{field}.{len(values)}"
            param = place if error.param in (None, "body") else f"{place}.{error.param}"
            raise InvalidRequest(f"{place}: {error.message}", param=param, code=error.code) from error
    return values


async def _read(request: Request, limit: int) -> bytes:
    """The body, given up on as soon as it is known to be too large."""
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise TooLarge(f"the body has {length} bytes, at most {limit} are taken", param="body")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"the body has more than {limit} bytes, which is the most that are taken", param="body")
        chunks.append(chunk)
    return b"".join(chunks)


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


def _fault(body: bytes, reason: str) -> InvalidRequest:
    """Why a text was refused, by a second, slower reading that tells where."""
    if not body.strip():
        return InvalidRequest("the body is empty: send a JSON object", param="body", code="invalid_json")
    try:
        _refuse_impossible(json.loads(body.decode()))
    except InvalidRequest as fault:
        return fault
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is no UTF-8"
    except (ValueError, RecursionError):
        pass  # the first reading's reason stands
    return InvalidRequest(f"the body is no JSON: {reason}, got {excerpt(body)}", param="body", code="invalid_json")


def _refuse_impossible(value: Any) -> None:
    """Find what the first reading refused, and name its place; a body that hides it deep is not searched to the end."""
    for path, leaf in itertools.islice(_leaves(value), _MOST_LEAVES):
        param = ".".join(path) or "body"
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise InvalidRequest(f"{param} must be a finite number, got {leaf}", param=param)
        if isinstance(leaf, str) and "\0" in leaf:
            raise InvalidRequest(f"{param} holds NUL, which no text has: {excerpt(leaf)}", param=param)
        if isinstance(leaf, str) and any("\ud800" <= character <= "\udfff" for character in leaf):
            raise InvalidRequest(f"{param} holds a lone surrogate, which is no character: {excerpt(leaf)}", param=param)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every scalar with its place; a key comes before what it leads to, at the place of its object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield path, key
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(index)))
    else:
        yield path, value
