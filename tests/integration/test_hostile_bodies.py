"""Bodies of the allowed size, made to be costly: each is answered, and none holds the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import httpx
import pytest

from tests.support.gateway import GatewayThread
from tests.support.watchdog import never_held

SIZE = 8 << 20
JSON, LINES = "application/json", "application/x-ndjson"
GENERATE, PROFILE, ADAPT = "/generate", "/users/somebody/profile", "/users/nobody-yet/adapt"


class Case(NamedTuple):
    name: str
    path: str
    make: Callable[[], bytes]
    code: str = "invalid_value"  # of the error
    media: str = JSON


def text(before: bytes, unit: bytes, after: bytes) -> bytes:
    """A body with one long text of `unit` again and again, as large as may be."""
    return before + unit * ((SIZE - len(before) - len(after)) // len(unit)) + after


def listed(unit: bytes) -> bytes:
    """A list of `unit` again and again, as large as may be."""
    return text(b"[", unit + b",", b"0]")


def fields(number: int) -> bytes:
    """An object of so many unknown fields."""
    return b"{" + b",".join(b'"%x":1' % field for field in range(number)) + b"}"


def nested(depth: int, *leaves: bytes) -> bytes:
    return b"[" * depth + b",".join(leaves) + b"]" * depth


def samples(*given: bytes) -> bytes:
    return b'{"samples":' + nested(1, *given) + b"}"


def conversation(*messages: bytes) -> bytes:
    return b'{"output":"a","input":' + nested(1, *messages) + b"}"


ONES = [b"1"] * 100_000
MESSAGE = b'{"role":"user","content":"x"}'
PROMPT = b'{"user_id":"u","prompt":"'
LONG, BLANK = conversation(*[MESSAGE] * 100), b'{"input":"q","output":" "}'
LISTS = nested(1, *[b"[]"] * 4_000)
CASES = [
    Case("nested 850 deep", GENERATE, lambda: nested(850, *ONES), "invalid_json"),
    Case("nested 190 deep, with NUL", GENERATE, lambda: nested(190, *ONES, rb'"\u0000"')),
    Case("NaN before much that is nested", GENERATE, lambda: b"[NaN," + nested(850, *ONES) + b"]"),
    Case("lists", GENERATE, lambda: listed(b"[]"), "too_many_values"),
    Case("long numbers", GENERATE, lambda: listed(b"1" * 4290), "too_many_values"),
    Case("brackets", GENERATE, lambda: b"[" * SIZE, "too_many_values"),
    Case("blanks", GENERATE, lambda: b" " * SIZE, "invalid_json"),
    Case("a text alone", GENERATE, lambda: text(b'"', b"x", b'"')),
    Case("a prompt", GENERATE, lambda: text(PROMPT, b"x", b'"}'), "prompt_too_long"),
    Case("a prompt of quotes", GENERATE, lambda: text(PROMPT, rb"\"", b'"}'), "prompt_too_long"),
    Case("backslashes before NUL", GENERATE, lambda: text(PROMPT, rb"\\", rb'\u0000"}')),
    Case("text before a lone surrogate", GENERATE, lambda: text(PROMPT, b"x", rb'\ud800"}')),
    Case("a user id", GENERATE, lambda: text(b'{"prompt":"x","user_id":"', "語".encode(), b'"}')),
    Case("a key with NUL within", GENERATE, lambda: text(b'{"', b"x", rb'":{"a":"\u0000"}}')),
    Case("an unknown field", GENERATE, lambda: text(PROMPT + b'x","', b"x", b'":1}'), "unknown_field"),
    Case("1,000 unknown fields", GENERATE, lambda: fields(1_000), "missing"),
    Case("100,000 unknown fields", GENERATE, lambda: fields(100_000), "too_many_fields"),
    Case("35,000 messages", GENERATE, lambda: b'{"user_id":"u","messages":' + nested(1, *[MESSAGE] * 35_000) + b"}"),
    Case("wrong messages", GENERATE, lambda: b'{"user_id":"u","messages":' + nested(1, *ONES) + b"}"),
    Case("items without a text", PROFILE, lambda: b'{"items":' + nested(1, *[b'{"id":"x"}'] * 10_000) + b"}"),
    Case("an item", PROFILE, lambda: text(b'{"items":[{"text":"', b"x", b'"}]}'), "item_too_large"),
    Case("items, one bad", PROFILE, lambda: text(b'{"items":[', b'{"text":"' + b"x" * 60_000 + b'"},', b"{}]}")),
    Case("a sample", ADAPT, lambda: text(b'{"samples":[{"input":"q","output":"', b"x", b'"}]}'), "sample_too_large"),
    Case("wrong conversations", ADAPT, lambda: samples(conversation(*[fields(900)] * 100)), "missing"),
    Case("30,000 messages, the last sample blank", ADAPT, lambda: samples(*[LONG] * 300, BLANK)),
    Case("lines", ADAPT, lambda: b"1\n" * (SIZE // 2), "too_many_lines", LINES),
    Case("lines of lists", ADAPT, lambda: text(b"", LISTS + b"\n", b""), "too_many_values", LINES),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_without_holding_the_event_loop(case: Case, gateway: GatewayThread, client: httpx.Client) -> None:
    content = case.make()
    assert len(content) <= SIZE
    method = "PUT" if case.path == PROFILE else "POST"
    with never_held(gateway.thread):
        response = client.request(method, case.path, content=content, headers={"Content-Type": case.media})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, case.code), error
    assert len(response.content) < 2_000
