"""Faults of parts under the load of crowds, and the time until recovery."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.fleet.exercise.asking import End, Outcome
from bench.fleet.exercise.crowds import Crowd, Person, ended
from bench.fleet.exercise.parts import KINDS, Parts, all_whole, kind_of
from bench.rig.processes import paused, wait_until

KILLS, PAUSE_S = 3, 20.0
PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    kind: str  # of the part that fails
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

    def lost(self, asked: Sequence[Outcome]) -> str:
        """Describe how requests ended that were open while the part was away."""
        beside = [one for one in asked if self.during(one.begun_s, one.ended_s)]
        ends = Counter(one.end for one in beside if one.end is not End.ANSWERED)
        lost = ", ".join(f"{count} {end}" for end, count in ends.items()) or "nothing lost"
        return f"whole after {self.recovery_s:.0f} s; of {len(beside)} requests: {lost}"


def shuffled(chance: random.Random) -> list[Fault]:
    """Return the faults in random order: each kind is killed `KILLS` times and paused once for `PAUSE_S`."""
    faults = [Fault(kind) for kind in KINDS for _ in range(KILLS)] + [Fault(kind, PAUSE_S) for kind in KINDS]
    chance.shuffle(faults)
    return faults


class Exercise:
    """Parts under the load of crowds, and their outages.

    Attributes:
        crowds: the crowds, one after the other at each gateway.
        outages: all faults that are over.
    """

    def __init__(self, parts: Parts, crowds: int, people: int, chance: random.Random, pause_s: float = 0.1) -> None:
        self.parts = parts
        urls = itertools.islice(itertools.cycle(parts.urls), crowds)
        self.crowds = [
            Crowd(url, f"crowd-{number}", people, f"{chance.random()}", parts.headers, pause_s=pause_s)
            for number, url in enumerate(urls)
        ]
        self.outages: list[Outage] = []
        self._chance = chance

    def start(self) -> None:
        """Start the load."""
        for crowd in self.crowds:
            crowd.start()

    def stop(self) -> tuple[list[Outcome], list[Person]]:
        """Stop the load; return what was asked, and the people."""
        return ended(self.crowds)

    def inflict(self, fault: Fault) -> Outage:
        """Inflict a fault on any part of its kind."""
        names = [name for name in self.parts.names if kind_of(name) == fault.kind]
        return self.strike(self._chance.choice(names), fault.pause_s)

    def strike(self, name: str, pause_s: float = 0.0) -> Outage:
        """Kill a part, or pause it, and return once all parts are ready again."""

        def fail() -> None:
            if pause_s:
                with paused(*self.parts.processes(name)):
                    time.sleep(pause_s)
            else:
                self.parts.kill(name)
            wait_until(lambda: all_whole(self.parts), f"all parts after a fault of {name}", PATIENCE_S)

        return self.during(Fault(kind_of(name), pause_s), fail)

    def during(self, fault: Fault, act: Callable[[], object]) -> Outage:
        """Do what takes a part away and back, and record it as an outage."""
        begun_s = time.monotonic()
        act()
        outage = Outage(fault, begun_s, time.monotonic())
        self.outages.append(outage)
        return outage
