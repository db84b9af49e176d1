"""A Valkey whose clock can be set, where Debian's `faketime` is installed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import redis

from bench.rig.valkey import DURABLE, ValkeyProcess

FAKE_TIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
"""The library that sets a server's clock, or None if it is not installed."""

CLOCK_TOLERANCE_S = 1.1
"""Largest undetectable clock error in seconds: the server reports whole seconds."""


class ClockedValkey(ValkeyProcess):
    """A `ValkeyProcess` with a clock of its own, which starts at the machine's time."""

    def __init__(self, folder: Path, options: Sequence[str] = DURABLE) -> None:
        super().__init__(folder, options)
        self._clock = folder / "clock"
        self.environment = {
            "LD_PRELOAD": str(FAKE_TIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def begin(self) -> list[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(0)
        return super().begin()

    def set_clock(self, ahead_s: float) -> None:
        """Set the server's clock this far ahead of the machine's; a negative value sets it behind."""
        self._write(ahead_s)
        with redis.Redis.from_url(self.url) as raw:
            deadline = time.monotonic() + 20
            while abs(int(raw.eval("return redis.call('TIME')[1]", 0)) - time.time() - ahead_s) > CLOCK_TOLERANCE_S:
                assert time.monotonic() < deadline, f"the server's clock is not {ahead_s} s ahead"

    def _write(self, ahead_s: float) -> None:
        draft = self._clock.with_suffix(".new")
        draft.write_text(f"{ahead_s:+.3f}\n", "ascii")
        draft.replace(self._clock)
