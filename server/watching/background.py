"""What every process does beside its work: it repeats steps, yields its core, and times the store."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn

from prometheus_client import CollectorRegistry, Histogram

from server.errors import ApiError

NICENESS = 10  # gets about a tenth of a core that something else wants
BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


async def forever(
    every_s: float | Callable[[], float], step: Callable[[], Awaitable[object]], log: logging.Logger
) -> NoReturn:
    """Run a step now, and again after each pause; whatever it raises is logged, an `ApiError` as a warning."""
    while True:
        try:
            await step()
        except ApiError as error:
            log.warning("%s", error.explained)
        except Exception:
            log.exception("%s failed", getattr(step, "__qualname__", step))
        await asyncio.sleep(every_s() if callable(every_s) else every_s)


def stand_back() -> None:
    """Have the scheduler prefer whatever else runs to this thread, and to those that it starts from now on."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class StoreSeconds:
    """How long the store takes. `kind` is `write` where the answer means that it is on disk, else `command`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        histogram = Histogram(
            "mta_store_seconds",
            "Round trips to the store, or several of them where one call makes several.",
            ("kind", "outcome"),
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._children = {
            (kind, failed): histogram.labels(kind, "failed" if failed else "ok")
            for kind in ("command", "write")
            for failed in (False, True)
        }

    def __call__(self, kind: str, seconds: float, failed: bool) -> None:
        self._children[kind, failed].observe(seconds)
