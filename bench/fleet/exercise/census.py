"""Resources of the fleet: processes, memory, descriptors and keys."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from bench.rig.processes import alive, memory_mib

MEMORY_GROWTH, MEMORY_SLACK_MIB = 1.25, 64.0
DESCRIPTOR_SLACK = 48
"""Number of descriptors that a part may gain during the run, for connections that are kept open."""

GONE_S = 30.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Resident MiB and open descriptors of one part with all its descendants."""

    memory_mib: float
    descriptors: int

    def exceeded_by(self, later: Usage) -> bool:
        """Whether `later` has grown beyond the tolerance."""
        beyond_memory = later.memory_mib > self.memory_mib * MEMORY_GROWTH + MEMORY_SLACK_MIB
        return beyond_memory or later.descriptors > self.descriptors + DESCRIPTOR_SLACK


def usage(pids: Sequence[int]) -> Usage:
    """Return what some processes use now, taken together."""
    handles = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    return Usage(sum(map(memory_mib, pids)), handles)


def kinds_of_keys(url: str) -> Counter[str]:
    """Count the store's keys by kind; the kind of a user's key is its last word, without the user."""
    with redis.Redis.from_url(url, decode_responses=True) as raw:
        return Counter(_kind(name) for name in raw.scan_iter(count=1000))


def _kind(name: str) -> str:
    head, _, rest = name.partition("}:")
    return rest.partition(":")[0] if rest and "{jobs:" not in head and "{sign:" not in head else head.partition("{")[0]


def left_over(pids: list[int]) -> list[int]:
    """Return the processes that are still alive after GONE_S seconds."""
    deadline_s = time.monotonic() + GONE_S
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return left
