"""Log lines: what a machine reads, what a person reads, and the ids in both."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from logging.config import dictConfig
from typing import Any

import pytest

from server.watching.logs import (
    VLLM_CONFIG,
    JsonFormatter,
    RequestIds,
    TextFormatter,
    request_id,
    trace_id,
    traceparent,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def in_a_traced_request() -> Iterator[None]:
    tokens = request_id.set("abc123"), traceparent.set(PARENT)
    yield
    request_id.reset(tokens[0])
    traceparent.reset(tokens[1])


def line(message: str, *arguments: object, **more: Any) -> logging.LogRecord:
    record = logging.LogRecord(
        "mta.test", logging.WARNING, "file.py", 1, message, arguments, more.pop("exc_info", None)
    )
    for name, value in more.items():
        setattr(record, name, value)
    return record


@pytest.mark.usefixtures("in_a_traced_request")
def test_a_line_has_its_ids_once_for_machines_and_for_people() -> None:
    shown = JsonFormatter().format(line("took %d ms\nand more", 7, fields={"ms": 7}))
    assert "\n" not in shown
    read = json.loads(shown)
    assert read.pop("time").endswith("Z")
    said = {"level": "WARNING", "logger": "mta.test", "message": "took 7 ms\nand more"}
    assert read == said | {"request": "abc123", "trace": TRACE, "ms": 7}
    assert TextFormatter().format(line("x")).endswith(f"x request=abc123 trace={TRACE}")
    assert TextFormatter().format(line("gen-abc123 broke")).endswith(f"gen-abc123 broke trace={TRACE}")


def test_outside_of_requests_there_are_no_ids_and_a_traceback_is_in_the_object() -> None:
    assert TextFormatter().format(line("x")).endswith("WARNING mta.test x")
    error = KeyError("lost")
    read = json.loads(JsonFormatter().format(line("x", exc_info=(type(error), error, None))))
    assert not {"request", "trace"} & read.keys()
    assert "KeyError: 'lost'" in read["error"]


async def test_an_engines_lines_carry_the_ids_that_the_gateway_sent() -> None:
    seen = []

    async def app(*_: object) -> None:
        seen.append((request_id.get(), trace_id()))

    headers = [(b"x-request-id", b"gen-1"), (b"traceparent", PARENT.encode())]
    await RequestIds(app)({"type": "http", "headers": headers}, None, None)  # type: ignore[arg-type]
    assert seen == [("gen-1", TRACE)]


def test_an_engines_configuration_can_be_loaded() -> None:
    before = logging.root.handlers[:]
    try:
        dictConfig(json.loads(VLLM_CONFIG.read_text("utf-8")) | {"incremental": False})
        assert isinstance(logging.root.handlers[0].formatter, JsonFormatter)
    finally:
        logging.root.handlers[:] = before
