"""Event loops: every task has its turn; no callback keeps a gateway's loop from everything else for too long."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST_MS = 200.0  # quadratic work on a large body takes seconds; shared cores double what they charge


async def settled() -> None:
    """Let every task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


@contextmanager
def never_held(thread: threading.Thread) -> Iterator[None]:
    """Fail if a callback of the asyncio loop in `thread` takes too much processor time, collections excluded."""
    longest_ms, longest = 0.0, ""
    loop: asyncio.AbstractEventLoop | None = None
    collected_s = collecting_since_s = 0.0
    run: Callable[[asyncio.Handle], None] = asyncio.Handle._run  # type: ignore[attr-defined]

    def measured(handle: asyncio.Handle) -> None:
        nonlocal loop, longest_ms, longest
        if threading.get_ident() != thread.ident:
            run(handle)
            return
        loop = handle._loop  # type: ignore[attr-defined]
        began_s = time.thread_time() - collected_s
        run(handle)
        held_ms = (time.thread_time() - collected_s - began_s) * 1000
        if held_ms > longest_ms:
            longest_ms, longest = held_ms, repr(handle)

    def collecting(phase: str, _: dict[str, Any]) -> None:
        nonlocal collected_s, collecting_since_s
        if threading.get_ident() == thread.ident:
            if phase == "start":
                collecting_since_s = time.thread_time()
            else:
                collected_s += time.thread_time() - collecting_since_s

    asyncio.Handle._run = measured  # type: ignore[attr-defined]
    gc.callbacks.append(collecting)
    try:
        yield
        if loop:  # the callback that sent the last answer may still be running
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(60)
    finally:
        gc.callbacks.remove(collecting)
        asyncio.Handle._run = run  # type: ignore[attr-defined]
    assert longest_ms <= LONGEST_MS, f"the event loop was held for {longest_ms:.0f} ms by {longest}"
