"""What the fleet takes: processes, memory, descriptors and keys."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import redis

from bench.fleet.machine import ENGINES, Machine
from bench.rig.processes import alive, descendants, memory_mib

MEMORY_GROWTH, MEMORY_SLACK_MIB = 1.25, 64.0
DESCRIPTOR_SLACK = 48
"""A part may have this many more at the end than at the beginning: connections that are kept for a while."""

GONE_S = 30.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What one part takes, with all processes below it: resident MiB and open descriptors."""

    memory_mib: float
    descriptors: int

    def exceeded_by(self, later: Usage) -> bool:
        """Whether `later` is more than a part may take that took this before."""
        beyond_memory = later.memory_mib > self.memory_mib * MEMORY_GROWTH + MEMORY_SLACK_MIB
        return beyond_memory or later.descriptors > self.descriptors + DESCRIPTOR_SLACK


def usage(machine: Machine) -> dict[str, Usage]:
    """What each part takes now, and `mta up` itself."""
    found = {"mta up": _of([machine.up.pid])}
    for name in (*ENGINES, "router", "gateway", "worker"):
        pid = machine.up.part(name)
        assert pid, f"{name} does not run"
        found[name] = _of([pid, *descendants(pid)])
    return found


def _of(pids: list[int]) -> Usage:
    handles = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    return Usage(sum(map(memory_mib, pids)), handles)


def kinds_of_keys(url: str) -> Counter[str]:
    """How many keys of each kind the store holds; of a user's keys the last word says which, and none says whose."""
    with redis.Redis.from_url(url, decode_responses=True) as raw:
        return Counter(_kind(name) for name in raw.scan_iter(count=1000))


def _kind(name: str) -> str:
    head, _, rest = name.partition("}:")
    return rest.partition(":")[0] if rest and "{jobs:" not in head and "{sign:" not in head else head.partition("{")[0]


def left_over(pids: list[int]) -> list[int]:
    """Those of these processes that are still there after a while."""
    deadline_s = time.monotonic() + GONE_S
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return left
