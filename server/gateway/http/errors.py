"""Returns all errors in OpenAI's shape, or in that of their route: our own, pydantic's and Starlette's."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from adapters.errors import excerpt, shortened
from server.errors import ApiError, InvalidRequest, NotFound, WrongMethod
from server.observability.logs import request_id

log = logging.getLogger("mta.gateway")

AS_TEXT, AS_MESSAGES = "as text", "as messages"  # tags of a union's members, which pydantic adds to error locations
MAX_SHOWN_CHARS = 120
_PLACES = ("body", "path", "query", "header")
_SUBJECT = re.compile(r"^(Value error, |(Input|String|List|Dictionary) should )")


class ErrorDetail(BaseModel, frozen=True):
    message: str = Field(description="What is wrong, the offending value, and what to do.")
    type: str
    param: str | None = Field(description="Path of the invalid field, e.g. `items.3.text`.")
    code: str = Field(description="A short machine-readable reason.")


class ErrorAnswer(BaseModel, frozen=True):
    """OpenAI's error shape, used by every 4xx and 5xx response but those of `/v1/messages`."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: ApiError) -> ErrorAnswer:
        return cls(error=ErrorDetail(message=error.message, type=error.kind, param=error.param, code=error.code))


def add_error_handlers(app: FastAPI) -> None:
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)


def fault_of(errors: Sequence[Any]) -> InvalidRequest:
    """Convert the first of pydantic's errors to `InvalidRequest`, with the field and the offending value."""
    first = errors[0]
    path = first["loc"][1:] if first["loc"] and first["loc"][0] in _PLACES else first["loc"]
    path = [part for part in path if part not in (AS_TEXT, AS_MESSAGES)]
    param = shortened(first.get("ctx", {}).get("param") or ".".join(map(str, path)) or "body", MAX_SHOWN_CHARS)
    value = excerpt(first.get("input"), MAX_SHOWN_CHARS)
    match first["type"]:
        case "missing":
            return InvalidRequest(f"{param} is required", param=param, code="missing")
        case "extra_forbidden":
            return InvalidRequest(f"unknown field {param!r}, got {value}", param=param, code="unknown_field")
        case "combination":  # of several fields, which the message names; the value is the whole body
            return InvalidRequest(first["msg"], param=param)
    rule = _SUBJECT.sub("", first["msg"])
    return InvalidRequest(f"{param} {rule if rule.startswith('must') else f'must {rule}'}, got {value}", param=param)


async def _on_error(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            shown = error
        case RequestValidationError():
            shown = fault_of(error.errors())
        case HTTPException():  # Starlette's own
            asked = f"{request.method} {excerpt(request.url.path)}"
            if error.status_code == 405:
                shown = WrongMethod(f"{asked}: method not allowed on this route; /docs lists all routes")
            else:
                shown = NotFound(f"{asked}: no such route; /docs lists all routes")
            shown.headers |= error.headers or {}
            if error.status_code == 405:  # Starlette names only the first route of this path
                routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
                shown.headers["Allow"] = ", ".join(sorted(set[str]().union(*(route.methods for route in routes))))
        case _:  # a bug; Starlette raises it again after the response, so that it gets logged
            shown = ApiError("internal error of the gateway: see its log")
            shown.headers["X-Request-Id"] = request_id.get()  # such a response passes by `RequestLog`
    return error_response(shown, getattr(request.scope.get("route"), "error_answer", ErrorAnswer.of))


def error_response(error: ApiError, answer: Callable[[ApiError], BaseModel] = ErrorAnswer.of) -> Response:
    """Return an error as a response, in the shape of its route, and log it if the server is to blame."""
    if error.status >= 500:
        log.warning("%s", error.explained)
    content = answer(error).model_dump_json()
    return Response(content, error.status, error.headers, media_type="application/json")
