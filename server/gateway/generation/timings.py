"""Where one request's milliseconds went."""

from __future__ import annotations

import time


class Timings:
    """Named durations of one request, in ms, in the order in which they became known.

    Args:
        started_s: when the request arrived, by the performance counter.
    """

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.ms: dict[str, float] = {}

    def record(self, name: str, since_s: float, until_s: float | None = None) -> None:
        """Set `name` to the time from `since_s` to `until_s` (default: now)."""
        until_s = time.perf_counter() if until_s is None else until_s
        self.ms[name] = round((until_s - since_s) * 1000, 3)

    def finish(self) -> None:
        """Set `total`: from the request's arrival until now."""
        self.record("total", self.started_s)

    def header(self) -> str:
        """The value of a `Server-Timing` header."""
        return ", ".join(f"{name};dur={ms}" for name, ms in self.ms.items())
