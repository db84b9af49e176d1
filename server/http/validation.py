"""Pydantic's findings in the words of our errors: the first fault, its field, and the value that is wrong."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any

from server.errors import InvalidRequest
from server.schemas import AS_MESSAGES, AS_TEXT

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
    param = _cut(first.get("ctx", {}).get("param") or ".".join(map(str, path)) or "body")
    value = _cut(_Short().repr(first.get("input")))
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


class _Short(reprlib.Repr):
    """`repr` that looks at the start of a value only, however large or deep it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist = 3, 4, 4
        self.maxstring = self.maxlong = MAX_SHOWN_CHARS


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 1]}…"
