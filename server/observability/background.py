"""Helpers for background work in every process: periodic steps, signals, thread priority, store timings."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn

from prometheus_client import CollectorRegistry, Histogram

from server.errors import ApiError

NICENESS = 10  # about a tenth of a core's time when other threads compete for it
BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


def exit_on_signals() -> None:
    """Let SIGTERM, and SIGHUP unless `nohup` ignores it, exit like Ctrl-C, so that servers that were started stop."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))


async def forever(
    every_s: float | Callable[[], float], step: Callable[[], Awaitable[object]], log: logging.Logger
) -> NoReturn:
    """Run `step` immediately, then again after each pause; log what it raises, an `ApiError` as a warning."""
    while True:
        try:
            await step()
        except ApiError as error:
            log.warning("%s", error.explained)
        except Exception:
            log.exception("%s failed", getattr(step, "__qualname__", step))
        await asyncio.sleep(every_s() if callable(every_s) else every_s)


def lower_priority() -> None:
    """Lower the scheduling priority of this thread and of the threads that it starts from now on."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class StoreSeconds:
    """Histogram of store latency; `kind` is `write` if the reply means that data is on disk, else `command`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        histogram = Histogram(
            "mta_store_seconds",
            "Time of calls to the store, each with one or more round trips.",
            ("kind", "outcome"),
            buckets=BUCKETS_S,
            registry=registry,
        )
        outcomes = ((False, "ok"), (True, "failed"))
        self._children = {(k, f): histogram.labels(k, name) for k in ("command", "write") for f, name in outcomes}

    def __call__(self, kind: str, seconds: float, failed: bool) -> None:
        self._children[kind, failed].observe(seconds)
