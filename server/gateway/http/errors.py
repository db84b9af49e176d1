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

AS_TEXT, AS_MESSAGES = "as text", "as messages"  # tags of a field's forms, which pydantic puts into errors' locations
MAX_SHOWN_CHARS = 120
_PLACES = ("body", "path", "query", "header")
_SUBJECT = re.compile(r"^(Value error, |(Input|String|List|Dictionary) should )")


class ErrorDetail(BaseModel, frozen=True):
    message: str = Field(description="What was wrong, the offending value, what to do.")
    type: str
    param: str | None = Field(description="The field at fault, in dots, e.g. `items.3.text`.")
    code: str = Field(description="A short machine-readable reason.")


class ErrorAnswer(BaseModel, frozen=True):
    """OpenAI's error shape, which every 4xx and 5xx answer has."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: ApiError) -> ErrorAnswer:
        return cls(error=ErrorDetail(message=error.message, type=error.kind, param=error.param, code=error.code))


def add_error_handlers(app: FastAPI) -> None:
    """Have an application answer in our shape, whatever is raised."""
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)


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


async def _on_error(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            found = error
        case RequestValidationError():
            found = fault_of(error.errors())
        case HTTPException():  # Starlette's own
            place = f"{request.method} {excerpt(request.url.path)}"
            if error.status_code == 405:
                found = WrongMethod(f"{place}: method not allowed on this route; /docs lists all routes")
            else:
                found = NotFound(f"{place}: no such route; /docs lists all routes")
            found.headers |= error.headers or {}
        case _:  # a bug of ours; Starlette raises it again for the log once this has been sent
            found = ApiError("the gateway failed: its log says why")
    if found.status >= 500:
        log.warning("%s", found.explained)
    content = ErrorAnswer.of(found).model_dump_json()
    return Response(content, found.status, found.headers, media_type="application/json")
