"""Work that a process repeats for as long as it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

from server.errors import ApiError


async def forever(
    every_s: float | Callable[[], float], step: Callable[[], Awaitable[object]], log: logging.Logger
) -> NoReturn:
    """Run a step now, and again a pause after each run; only cancellation ends this, whatever the step raises.

    Args:
        every_s: the pause after each run of the step, or what says how long the next one is.
        step: what to do. An `ApiError`, such as a store that is down, is logged as a warning; anything else as a bug.
        log: where both are logged.
    """
    while True:
        try:
            await step()
        except ApiError as error:
            log.warning("%s", error.explained)
        except Exception:
            log.exception("%s failed", getattr(step, "__qualname__", step))
        await asyncio.sleep(every_s() if callable(every_s) else every_s)
