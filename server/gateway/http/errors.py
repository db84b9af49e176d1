"""All errors in OpenAI's shape: ours, pydantic's, and Starlette's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from adapters.errors import excerpt, shortened
from server.errors import ApiError, InvalidRequest, NotFound, WrongMethod

log = logging.getLogger("mta.gateway")

AS_TEXT, AS_MESSAGES = "as text", "as messages"
"""Tags of the two forms of a field; pydantic writes them into the locations of errors."""

MAX_SHOWN_CHARS = 120
_PLACES = ("body", "path", "query", "header")
_SUBJECT = re.compile(r"^(Value error, |(Input|String|List|Dictionary) should )")


class ErrorDetail(BaseModel, frozen=True):
    """What went wrong."""

    message: str = Field(description="What was wrong, the offending value, what to do.")
    type: str
    param: str | None = Field(description="The field at fault, in dots, e.g. `items.3.text`.")
    code: str = Field(description="A short machine-readable reason.")


class ErrorAnswer(BaseModel, frozen=True):
    """OpenAI's error shape, which every 4xx and 5xx answer has."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: ApiError) -> ErrorAnswer:
        """What a client is told about an error."""
        return cls(error=ErrorDetail(message=error.message, type=error.kind, param=error.param, code=error.code))


def error_response(error: ApiError) -> Response:
    """The answer to a request that failed."""
    content = ErrorAnswer.of(error).model_dump_json()
    return Response(content, error.status, error.headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Have an application answer in our shape, whatever is raised."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


def fault_of(errors: Sequence[Any]) -> InvalidRequest:
    """The first of pydantic's errors in our words, with its field and the offending value."""
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
        case "one_of":
            return InvalidRequest(f"{first['msg']}, got {value}", param=param)
    found = _SUBJECT.match(first["msg"])
    rule = first["msg"][found.end() :] if found else first["msg"]
    return InvalidRequest(f"{param} {rule if rule.startswith('must') else f'must {rule}'}, got {value}", param=param)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status >= 500:
        log.warning("%s", error.explained)
    return error_response(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(fault_of(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown routes and wrong methods."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {excerpt(request.url.path)}"
    if error.status_code == 405:
        response = error_response(WrongMethod(f"{place}: method not allowed on this route; /docs lists all routes"))
    else:
        response = error_response(NotFound(f"{place}: no such route; /docs lists all routes"))
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    """A bug of ours; Starlette raises it again for the log once this has been sent."""
    return await _on_api_error(request, ApiError("the gateway failed: its log says why"))
