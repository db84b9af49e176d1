"""Faults of parts in a seeded order, and the time until recovery."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.fleet.machine import ENGINES, Machine
from bench.rig.processes import descendants, paused, wait_until

PARTS = ("gateway", "engine", "router", "worker", "valkey")
KILLS, PAUSE_S = 3, 20.0
STORE_AWAY_S = 1.0
"""Seconds from the kill of the store until this benchmark restarts it."""

PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    part: str  # the part that fails; `engine` means one of the two
    pause_s: float = 0.0  # seconds of a pause; 0 means a kill


@dataclass(frozen=True, slots=True)
class Outage:
    """A fault that is over. Times are of the monotonic clock."""

    fault: Fault  # the fault
    begun_s: float  # start of the fault
    over_s: float  # time at which all parts were ready again

    @property
    def recovery_s(self) -> float:
        """Seconds until all parts were ready, after a kill or after the end of a pause."""
        return self.over_s - self.begun_s - self.fault.pause_s

    def during(self, begun_s: float, ended_s: float) -> bool:
        """Whether the outage overlaps the time from `begun_s` to `ended_s`."""
        return begun_s < self.over_s and ended_s > self.begun_s


def shuffled(chance: random.Random) -> list[Fault]:
    """Return the faults in random order: each part is killed `KILLS` times and paused once for `PAUSE_S`."""
    faults = [Fault(part) for part in PARTS for _ in range(KILLS)] + [Fault(part, PAUSE_S) for part in PARTS]
    chance.shuffle(faults)
    return faults


class Faults:
    """Inflicts faults and records the outages."""

    def __init__(self, machine: Machine, chance: random.Random) -> None:
        self._machine = machine
        self._chance = chance
        self.outages: list[Outage] = []

    def inflict(self, fault: Fault) -> Outage:
        """Inflict a fault, and return once all parts are ready again."""
        begun_s = time.monotonic()
        name = self._chance.choice(ENGINES) if fault.part == "engine" else fault.part
        if fault.part == "valkey":
            self._store(fault)
        elif fault.pause_s:
            with paused(*self._family(name)):
                time.sleep(fault.pause_s)
        else:
            self._kill(name)
        wait_until(self._machine.whole, f"all parts after {fault}", PATIENCE_S)
        outage = Outage(fault, begun_s, time.monotonic())
        self.outages.append(outage)
        return outage

    def _kill(self, name: str) -> None:
        up = self._machine.up
        starts, pid = up.starts(name), up.part(name)
        assert pid, f"{name} does not run"
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: up.starts(name) > starts, f"{name} to be started again", PATIENCE_S)

    def _family(self, name: str) -> Sequence[int]:
        pid = self._machine.up.part(name)
        assert pid, f"{name} does not run"
        return [pid, *descendants(pid)]

    def _store(self, fault: Fault) -> None:
        if fault.pause_s:
            with paused(self._machine.store.pid):
                time.sleep(fault.pause_s)
        else:
            self._machine.store.kill()
            time.sleep(STORE_AWAY_S)
            self._machine.store.start()
