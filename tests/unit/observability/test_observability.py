"""Log lines for machines and people, with the ids of a request; what is done again and again, whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from logging.config import dictConfig
from typing import Any

import pytest

from server.errors import Unavailable
from server.observability import logs
from server.observability.background import forever
from server.observability.logs import JsonFormatter, RequestIds, TextFormatter, request_id, traceparent

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
log = logging.getLogger("tests.watching")


def line(message: str, *arguments: object, exc_info: Any = None, **more: Any) -> logging.LogRecord:
    record = logging.LogRecord("mta.test", logging.WARNING, "file.py", 1, message, arguments, exc_info)
    record.__dict__.update(more)
    return record


async def test_a_line_has_its_ids_once_for_machines_and_for_people() -> None:
    request_id.set("abc123"), traceparent.set(PARENT)  # in this test's own task
    shown = JsonFormatter().format(line("took %d ms\nand more", 7, fields={"ms": 7}))
    assert "\n" not in shown
    read = json.loads(shown)
    assert read.pop("time").endswith("Z")
    said = {"level": "WARNING", "logger": "mta.test", "message": "took 7 ms\nand more"}
    assert read == said | {"request": "abc123", "trace": TRACE, "ms": 7}
    assert TextFormatter().format(line("x")).endswith(f"x request=abc123 trace={TRACE}")
    assert TextFormatter().format(line("gen-abc123 broke")).endswith(f"gen-abc123 broke trace={TRACE}")


def test_log_outside_requests_has_no_ids_and_keeps_traceback() -> None:
    assert TextFormatter().format(line("x")).endswith("WARNING mta.test x")
    error = KeyError("lost")
    read = json.loads(JsonFormatter().format(line("x", exc_info=(type(error), error, None))))
    assert not {"request", "trace"} & read.keys()
    assert "KeyError: 'lost'" in read["error"]


async def test_an_engines_lines_carry_the_ids_that_the_gateway_sent() -> None:
    seen = []

    async def app(*_: object) -> None:
        seen.append((request_id.get(), traceparent.get()))

    headers = [(b"x-request-id", b"gen-1"), (b"traceparent", PARENT.encode())]
    await RequestIds(app)({"type": "http", "headers": headers}, None, None)  # type: ignore[arg-type]
    assert seen == [("gen-1", PARENT)]


def test_an_engines_configuration_can_be_loaded() -> None:
    before = logging.root.handlers[:]
    try:
        dictConfig(json.loads(logs.VLLM_CONFIG.read_text("utf-8")) | {"incremental": False})
        assert isinstance(logging.root.handlers[0].formatter, JsonFormatter)
    finally:
        logging.root.handlers[:] = before


async def run(every_s: float | Callable[[], float], step: Callable[[], Awaitable[object]], done: asyncio.Event) -> None:
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(forever(every_s, step, log))
        await done.wait()
        running.cancel()


async def test_a_step_is_run_again_after_any_error_and_each_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, log.name)  # whatever other tests have set
    errors: list[Exception] = [Unavailable("the store is away"), KeyError("a fault of ours")]
    recovered = asyncio.Event()

    async def look_after_it() -> None:
        if errors:
            raise errors.pop(0)
        recovered.set()

    await run(0, look_after_it, recovered)
    warning, fault = (record for record in caplog.records if record.name == log.name)
    assert (warning.levelname, warning.getMessage()) == ("WARNING", "the store is away")
    assert (fault.levelname, fault.exc_info is not None) == ("ERROR", True)
    assert "look_after_it" in fault.getMessage()


async def test_how_long_the_next_pause_is_can_be_asked_anew_each_time() -> None:
    pauses_s, steps, pausing = [0.0, 0.0], list[None](), asyncio.Event()

    async def step() -> None:
        steps.append(None)

    def pause_s() -> float:
        if pauses_s:
            return pauses_s.pop()
        pausing.set()
        return 3600

    await run(pause_s, step, pausing)
    assert len(steps) == 3
