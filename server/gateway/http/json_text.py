"""Strict JSON: no NaN, Infinity, NUL or lone surrogates, which Python's parser lets through.

Parsing costs more by values than by bytes, so values are counted first: no step takes more than tens of milliseconds.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic_core import from_json

from adapters.errors import excerpt, shortened
from bank.items.profile import has_surrogate
from server.errors import InvalidRequest

MAX_STRUCTURE_BYTES = 512 << 10
"""Most bytes that are quotes or outside quotes, except white space: every value has at least one of them."""
MAX_FIELDS = 1000  # of one object: each unknown one is an error of its own

_ESCAPED_BACKSLASH = rb"\\"
_NUL = rb"\u0000"
_TOO_DEEP = "recursion limit"


def parse_json(body: bytes) -> Any:
    """The value of a JSON text, nested at most 200 levels deep."""
    bare = body.replace(_ESCAPED_BACKSLASH, b"")  # any backslash left escapes what follows it
    _check_structure(bare)
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise _fault(body, str(error)) from error
    _check_fields(value)
    if _NUL in bare:
        _refuse_impossible(value)
        raise InvalidRequest("the body holds NUL, which no text may contain", param="body")
    return value


def parse_lines(body: bytes, field: str, most: int) -> list[Any]:
    """The values of newline-delimited JSON, which fill `field`: at most `most` lines, without the empty ones."""
    count = body.count(b"\n") + 1
    if count <= 2 * most:  # fewer lines are left without the empty ones
        lines = [line for line in body.split(b"\n") if line.strip()]
        count = len(lines)
    if count > most:
        raise InvalidRequest(
            f"{field} has {count} lines, at most {most} are allowed", param=field, code="too_many_lines"
        )
    _check_structure(body.replace(_ESCAPED_BACKSLASH, b""))
    values = []
    for place, line in enumerate(lines):
        try:
            values.append(parse_json(line))
        except InvalidRequest as error:
            param = f"{field}.{place}" if error.param in (None, "body") else f"{field}.{place}.{error.param}"
            message = f"{field}.{place}: {error.message}"
            raise InvalidRequest(message, param=shortened(param), code=error.code) from error
    return values


def _check_structure(bare: bytes) -> None:
    """Refuse a text with too many values, given without its escaped backslashes."""
    if len(bare) <= MAX_STRUCTURE_BYTES:
        return
    bare = bare.replace(rb"\"", b"")
    structure = bare.count(b'"')
    if structure <= MAX_STRUCTURE_BYTES:
        outside = b"".join(bare.split(b'"')[::2])
        structure += len(outside.translate(None, b" \t\r\n"))
    if structure > MAX_STRUCTURE_BYTES:
        raise InvalidRequest(
            f"the body has more than {MAX_STRUCTURE_BYTES} bytes of quotes, numbers and punctuation, the most that are "
            "allowed besides text: send it in parts",
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


def _fault(body: bytes, reason: str) -> InvalidRequest:
    """Why a text was refused, from a second, slower parse that finds the place."""
    if not body.strip():
        return InvalidRequest("the body is empty: send a JSON object", param="body", code="invalid_json")
    try:
        if _TOO_DEEP not in reason:
            _refuse_impossible(json.loads(body.decode()))
    except InvalidRequest as fault:
        return fault
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError):
        pass  # the first parse's reason stands
    return InvalidRequest(f"the body is not JSON: {reason}, got {excerpt(body)}", param="body", code="invalid_json")


def _refuse_impossible(value: Any) -> None:
    if found := _find_fault(value):
        fault, path = found
        param = shortened(".".join(reversed(path))) or "body"
        raise InvalidRequest(f"{param} {fault}", param=param)


def _find_fault(value: Any) -> tuple[str, list[str]] | None:
    """The first thing that no field accepts, and the names on the way to it, the innermost first.

    A key at fault is found at its object's place.
    """
    if not isinstance(value, (dict, list)):
        return (fault, []) if (fault := _fault_of_leaf(value)) else None
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(name, str) and (fault := _fault_of_leaf(name)):
            return fault, []
        if found := _find_fault(inner):
            found[1].append(str(name))
            return found
    return None


def _fault_of_leaf(leaf: Any) -> str | None:
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return f"must be a finite number, got {leaf}"
    if isinstance(leaf, str) and "\0" in leaf:
        return f"holds NUL, which no text may contain: {excerpt(leaf)}"
    if isinstance(leaf, str) and has_surrogate(leaf):
        return f"holds a lone surrogate, which is not a character: {excerpt(leaf)}"
    return None
