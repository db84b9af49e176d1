"""Pydantic's findings in the words of our errors: the first fault, its field, and the value that is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from adapters.errors import excerpt, shortened
from server.errors import InvalidRequest
from server.gateway.http.requests import AS_MESSAGES, AS_TEXT

MAX_SHOWN_CHARS = 120
_PLACES = ("body", "path", "query", "header")
_SUBJECT = re.compile(r"^(Value error, |(Input|String|List|Dictionary) should )")


def fault_of(errors: Sequence[Any]) -> InvalidRequest:
    """The error to answer with.

    Args:
        errors: as of `RequestValidationError.errors()`, at least one.
    """
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
