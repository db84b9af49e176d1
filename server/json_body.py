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

_NUL_ESCAPE = b"\\u0000"
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # an even number of backslashes before it are themselves escaped
_MOST_LEAVES = 100_000


class JsonRoute(APIRoute):
    """A FastAPI route whose JSON body has been read by this module's rules."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def strict(request: Request) -> Response:
            _check_media_type(request.headers.get("content-type"))
            body = await _read(request, parts_of(request).settings.max_body_bytes)
            return await handle(_ParsedRequest(request, body, parse_json(body)))

        return strict


class _ParsedRequest(Request):
    """A request that hands FastAPI the body as it was parsed here."""

    def __init__(self, request: Request, body: bytes, parsed: Any) -> None:
        super().__init__(request.scope, request.receive)
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


def _check_media_type(content_type: str | None) -> None:
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise WrongMediaType(
            f"Content-Type must be application/json, got {excerpt(content_type)}", param="content-type"
        )


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
