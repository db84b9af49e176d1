"""Bounds on JSON schemas: an engine's API process stands still, with all requests, until it has compiled one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
from pydantic_core import PydanticCustomError

MAX_BYTES = 32 << 10  # 3 s a MB
MAX_STATES = 2_000  # a second or two; one that repeats itself 127 times within 127 times has 32,000
MAX_REPEATS = 128  # xgrammar compiles no pattern with a higher count: a request would end in an engine's fault
MAX_COUNTED = 200  # properties of objects that bound their number: the square of it counts, and 1,000 take 5 s
_MAX_DIGITS = 9
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)|\{ *+(\d++) *+(?:, *+(\d*+) *+)?\}|.", re.DOTALL)
"""Read in one pass: an unclosed class ends with the text, and no quantifier gives anything back."""
_NO_STATE = "?*+|^$"


def check_schemas(schemas: Iterable[Any]) -> None:
    """Raise PydanticCustomError if these schemas together would take an engine too long."""
    states = counted = 0
    for part in _objects(schemas):
        properties, named = part.get("properties"), part.get("patternProperties")
        states += sum(map(states_of, named)) if isinstance(named, dict) else 0
        states += states_of(pattern) if isinstance(pattern := part.get("pattern"), str) else 0
        if isinstance(properties, dict) and not {"minProperties", "maxProperties"}.isdisjoint(part):
            counted += len(properties)
    if states > MAX_STATES:
        raise PydanticCustomError(
            "schema",
            f"must have patterns that repeat less: a part at most {MAX_REPEATS} times, and all of them at most "
            f"{MAX_STATES} places with their repeats written out (maxLength and maxItems may be of any size)",
        )
    if counted > MAX_COUNTED:
        raise PydanticCustomError(
            "schema",
            f"must have at most {MAX_COUNTED} properties beside minProperties and maxProperties, not {counted}",
        )


def check_size(value: Any) -> None:
    if len(orjson.dumps(value)) > MAX_BYTES:
        raise PydanticCustomError("schema", f"must have at most {MAX_BYTES} bytes as JSON")


def states_of(pattern: str) -> int:
    """Return about how many states a regular expression has: what a counted repeat repeats counts as often.

    It is a number beyond `MAX_STATES` for all that have more, or that repeat a part more than `MAX_REPEATS` times.
    """
    groups, last = [0], 0
    for matched in _ATOM.finditer(pattern):
        if groups[-1] > MAX_STATES:
            return groups[-1]
        atom, least, most = matched[0], matched[1], matched[2]
        if least:
            times = max(int(least[:_MAX_DIGITS]), int((most or "0")[:_MAX_DIGITS]))
            if times > MAX_REPEATS:
                return MAX_STATES + times
            groups[-1] += last * (times - 1)
            last *= times
        elif atom == "(":
            groups.append(0)
        elif atom == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif atom not in _NO_STATE:
            last = 1
            groups[-1] += 1
    return sum(groups)


def _objects(values: Iterable[Any]) -> Iterator[dict[str, Any]]:
    inside = list(values)
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            yield value
            inside += value.values()
        elif isinstance(value, list):
            inside += value
