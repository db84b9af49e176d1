"""A strict JSON parser: rejects NaN, Infinity, NUL and lone surrogates, which Python's parser accepts.

Parsing time depends mostly on the number of values, so these are counted first.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic_core import from_json

from adapters.errors import excerpt, shortened
from bank.items.profile import has_surrogate
from server.errors import InvalidRequest

MAX_STRUCTURE_BYTES = 512 << 10  # of quotes and non-space bytes outside strings; every value has at least one
MAX_FIELDS = 1000  # per object, because pydantic reports an error for each unknown field

_ESCAPED_BACKSLASH = rb"\\"


def parse_json(body: bytes) -> Any:
    """Parse a JSON text with at most 200 levels of nesting."""
    bare = body.replace(_ESCAPED_BACKSLASH, b"")  # each remaining backslash escapes the next character
    _check_structure(bare)
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise _parse_error(body, str(error)) from error
    _check_fields(value)
    if rb"\u0000" in bare:
        _check_leaves(value, [])
        raise InvalidRequest("the body contains NUL, which is not allowed in text", param="body")
    return value


def parse_lines(body: bytes, field: str, max_lines: int) -> list[Any]:
    """Parse newline-delimited JSON into the values of `field`; at most `max_lines` lines, not counting empty ones."""
    count = body.count(b"\n") + 1
    if count <= 2 * max_lines:  # some lines may be empty, which do not count
        lines = [line for line in body.split(b"\n") if line.strip()]
        count = len(lines)
    if count > max_lines:
        raise InvalidRequest(
            f"{field} has {count} lines, at most {max_lines} are allowed", param=field, code="too_many_lines"
        )
    _check_structure(body.replace(_ESCAPED_BACKSLASH, b""))
    values = []
    for position, line in enumerate(lines):
        try:
            values.append(parse_json(line))
        except InvalidRequest as error:
            param = f"{field}.{position}" if error.param in (None, "body") else f"{field}.{position}.{error.param}"
            message = f"{field}.{position}: {error.message}"
            raise InvalidRequest(message, param=shortened(param), code=error.code) from error
    return values


def _check_structure(bare: bytes) -> None:
    """Raise if a text has too many values; `bare` is the text without its escaped backslashes."""
    if len(bare) <= MAX_STRUCTURE_BYTES:
        return
    bare = bare.replace(rb"\"", b"")
    structure = bare.count(b'"')
    if structure <= MAX_STRUCTURE_BYTES:
        outside = b"".join(bare.split(b'"')[::2])
        structure += len(outside.translate(None, b" \t\r\n"))
    if structure > MAX_STRUCTURE_BYTES:
        raise InvalidRequest(
            f"the body has more than {MAX_STRUCTURE_BYTES} bytes of quotes, numbers and punctuation, the maximum "
            "besides text: send it in parts",
            param="body",
            code="too_many_values",
        )


def _check_fields(value: Any) -> None:
    inside = [value] if isinstance(value, (dict, list)) else []
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            if len(value) > MAX_FIELDS:
                raise InvalidRequest(
                    f"an object has {len(value)} fields, at most {MAX_FIELDS} are allowed: {excerpt(value)}",
                    param="body",
                    code="too_many_fields",
                )
            value = value.values()
        inside += [inner for inner in value if isinstance(inner, (dict, list))]


def _parse_error(body: bytes, reason: str) -> InvalidRequest:
    """Return the error for an invalid text; a second, slower parse locates it."""
    if not body.strip():
        return InvalidRequest("the body is empty: send a JSON object", param="body", code="invalid_json")
    try:
        if "recursion limit" not in reason:
            _check_leaves(json.loads(body.decode()), [])
    except InvalidRequest as fault:
        return fault
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError):
        pass  # keep the reason of the first parse
    return InvalidRequest(f"the body is not JSON: {reason}, got {excerpt(body)}", param="body", code="invalid_json")


def _check_leaves(value: Any, path: list[object]) -> None:
    """Raise for the first invalid leaf of the value at `path`; an invalid key has the path of its object."""
    fault = ""
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, str):
                _check_leaves(name, path)
            path.append(name)
            _check_leaves(inner, path)
            path.pop()
    elif isinstance(value, float) and not math.isfinite(value):
        fault = f"must be a finite number, got {value}"
    elif isinstance(value, str) and "\0" in value:
        fault = f"contains NUL, which is not allowed in text: {excerpt(value)}"
    elif isinstance(value, str) and has_surrogate(value):
        fault = f"contains a lone surrogate, which is not a character: {excerpt(value)}"
    if fault:
        param = shortened(".".join(map(str, path))) or "body"
        raise InvalidRequest(f"{param} {fault}", param=param)
