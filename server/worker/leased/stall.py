"""Detects stalled computations. A thread cannot be ended from outside: only its process can."""

from __future__ import annotations

import time

STALL_S = 600.0
"""A computation that makes no step, and reads no item between steps, for this long is not just slow: a slow processor
takes a minute for a step of a full context."""


class Stalled(Exception):
    """A computation shows no sign of life."""


class Pulse:
    """The last sign of life of a computation, given by its thread."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()

    def beat(self) -> None:
        """Give a sign of life."""
        self._at_s = time.monotonic()

    def check(self, what: str) -> None:
        """Expect a sign of life within `STALL_S`.

        Args:
            what: names the computation in the error.

        Raises:
            Stalled: when there was none.
        """
        if time.monotonic() - self._at_s > STALL_S:
            raise Stalled(f"{what}: no step within {STALL_S:g} s; this process cannot go on")
