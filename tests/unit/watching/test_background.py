"""What is done again and again survives whatever goes wrong in it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from server.errors import Unavailable
from server.watching.background import forever

log = logging.getLogger("tests.watching")


async def test_a_step_is_run_again_after_any_error_and_each_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, log.name)  # whatever other tests have set
    errors: list[Exception] = [Unavailable("the store is away"), KeyError("a fault of ours")]
    recovered = asyncio.Event()

    async def look_after_it() -> None:
        if errors:
            raise errors.pop(0)
        recovered.set()

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(forever(0, look_after_it, log))
        await recovered.wait()
        watching.cancel()
    warning, fault = caplog.records
    assert (warning.levelname, warning.getMessage()) == ("WARNING", "the store is away")
    assert (fault.levelname, fault.exc_info is not None) == ("ERROR", True)
    assert "look_after_it" in fault.getMessage()


async def test_how_long_the_next_pause_is_can_be_asked_anew_each_time() -> None:
    pauses_s, steps = [0.0, 0.0], list[None]()
    pausing = asyncio.Event()

    async def step() -> None:
        steps.append(None)

    def pause_s() -> float:
        if pauses_s:
            return pauses_s.pop()
        pausing.set()
        return 3600

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(forever(pause_s, step, log))
        await pausing.wait()
        watching.cancel()
    assert len(steps) == 3
