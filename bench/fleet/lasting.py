"""`mta bench fleet lasting`: hours of mixed load with deaths, backups, a change of bank and of the secret.

The fleet is that of `mta bench fleet rolling`, with a worker. Its load takes some 60 % of two cores, so that everything
is ready between two events. Memory and descriptors of each part are read all the time, since what grows slowly shows
only here. Bank and secret are exchanged early, and in the second half only the first gateway and the first engine die:
all other processes are old in the end.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import redis
import typer

from bench import script
from bench.fleet.exercise import census, claims
from bench.fleet.exercise.claims import Claim
from bench.fleet.exercise.crowds import TIMEOUT_S
from bench.fleet.exercise.faults import Exercise, Fault
from bench.fleet.exercise.parts import KINDS, Replacement, all_whole, kind_of
from bench.fleet.exercise.processes import ProcessFleet
from bench.fleet.exercise.replacing import CALM_S, exchange_secret
from bench.page.report import console, report

CROWDS, CROWD = 6, 12
OLD = {"gateway-2", "engine-2", "router", "worker", "valkey"}
READ_S = 30.0
SETTLED_SHARE = 0.5
"""Share of the run after which growth counts: caches are full, every code path has run, and most processes live on."""

NEW_SECRET = "the next secret of a fleet that lasts"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the parts used at one time."""

    at_s: float  # since the begin
    parts: dict[str, census.Usage]
    pids: dict[str, int]
    keys: int  # in the store


@dataclass(frozen=True, slots=True)
class Lasting:
    """Everything that happens to a fleet under load."""

    fleet: ProcessFleet
    exercise: Exercise
    folder: Path

    def die(self, kind: str) -> None:
        """Kill the first part of a kind, start it again as a supervisor would, and wait until it is ready."""
        self.exercise.strike(next(name for name in self.fleet.names if kind_of(name) == kind))

    def back_up(self) -> None:
        self.fleet.command("backup", "--out", str(self.folder / "backups"))

    def change_bank(self) -> None:
        """Roll out the next bank, as docs/scaling.md says."""
        for step in self.fleet.replacements():
            self._replace(step)

    def change_secret(self) -> None:
        exchange_secret(self.fleet, NEW_SECRET, self._replace)

    def _replace(self, step: Replacement) -> None:
        self.exercise.during(Fault(kind_of(step.part)), step.replace)
        time.sleep(CALM_S)


class Reader(threading.Thread):
    """Reads what the parts use until `stop`."""

    def __init__(self, fleet: ProcessFleet, every_s: float) -> None:
        super().__init__(daemon=True)
        self.readings: list[Reading] = []
        self._fleet, self._every_s = fleet, every_s
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        begun_s = time.monotonic()
        while not self._stop_asked.wait(self._every_s):
            if all_whole(self._fleet):
                with suppress(OSError, redis.RedisError):  # a part has died meanwhile
                    self.readings.append(self._read(time.monotonic() - begun_s))

    def _read(self, at_s: float) -> Reading:
        pids = {name: self._fleet.processes(name) for name in self._fleet.names}
        used = {name: census.usage(family) for name, family in pids.items()}
        keys = census.kinds_of_keys(self._fleet.store.url).total()
        return Reading(at_s, used, {name: family[0] for name, family in pids.items()}, keys)


def main(
    *,
    minutes: Annotated[float, typer.Option(help="Duration of the load.", min=1)] = 240.0,
    death_s: Annotated[float, typer.Option(help="Mean seconds between two deaths.", min=10)] = 180.0,
    backup_minutes: Annotated[float, typer.Option(help="Minutes between two backups.", min=0.5)] = 60.0,
    pause_s: Annotated[float, typer.Option(help="Mean seconds between two requests of a crowd.", min=0.01)] = 0.15,
    seed: Annotated[int, typer.Option(help="Seed of the deaths and of people's requests.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Keep a fleet busy for hours; exit status 1 if something is lost or grows. Ctrl-C judges what there is by then."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as ended:
        fleet = ProcessFleet(Path(scratch), ended, worker=True)
        exercise, reader = Exercise(fleet, CROWDS, CROWD, chance, pause_s), Reader(fleet, READ_S)
        lasting = Lasting(fleet, exercise, Path(scratch))
        keys_before, begun_s = census.kinds_of_keys(fleet.store.url), time.monotonic()
        exercise.start()
        reader.start()
        happened: list[tuple[str, float]] = []
        failed: list[Claim] = []
        with suppress(KeyboardInterrupt):
            for at_s, what, event in plan(lasting, chance, 60 * minutes, death_s, 60 * backup_minutes):
                time.sleep(max(0.0, begun_s + at_s - time.monotonic()))
                event_s = time.monotonic()
                happened.append((what, event_s - begun_s))
                try:
                    event()
                except AssertionError as error:
                    failed.append(Claim(what, str(error), False))
                    break
                taken_s = time.monotonic() - event_s
                console().print(f"{(event_s - begun_s) / 60:6.1f} min  {what}: {taken_s:.1f} s")
        lasted_s = time.monotonic() - begun_s
        asked, people = exercise.stop()
        reader.stop()
        settled, last = reader.readings[int(SETTLED_SHARE * len(reader.readings))], reader.readings[-1]
        lived = {name: used for name, used in settled.parts.items() if settled.pids[name] == last.pids[name]}
        with httpx.Client(base_url=fleet.urls[0], timeout=TIMEOUT_S) as client:
            found = [
                *failed,
                *claims.about_outages(exercise.outages),
                Claim("lived through the second half", ", ".join(lived), lived.keys() >= OLD),
                *claims.about_load(client, asked, people, exercise.outages),
                *claims.about_growth(lived, last.parts),
                *claims.after_erasing(client, people, fleet.store.url, keys_before, moved=len(people)),
            ]
    readings = [
        {"at_s": one.at_s, "keys": one.keys, **{f"{name}, MiB": use.memory_mib for name, use in one.parts.items()}}
        for one in reader.readings
    ]
    title = f"{lasted_s / 60:.0f} minutes of load, {len(exercise.outages)} parts killed or exchanged, seed {seed}"
    rows = [claim.row for claim in found]
    report(title, rows, out, bench="lasting", readings=readings, events=happened)


def plan(
    lasting: Lasting, chance: random.Random, lasts_s: float, death_s: float, backup_s: float
) -> Iterator[tuple[float, str, Callable[[], None]]]:
    """Yield what happens and when, in seconds from the begin; the bank changes after 10 % and the secret after 25 %."""
    events: list[tuple[float, str, Callable[[], None]]] = [
        (0.1 * lasts_s, "next bank", lasting.change_bank),
        (0.25 * lasts_s, "next secret", lasting.change_secret),
    ]
    events += [(at * backup_s, "backup", lasting.back_up) for at in range(1, int(lasts_s / backup_s) + 1)]
    at_s = 0.0
    while (at_s := at_s + chance.uniform(0.5, 1.5) * death_s) < lasts_s - death_s / 2:
        kind = chance.choice(KINDS if at_s < lasts_s / 2 - death_s else KINDS[:2])
        events.append((at_s, f"death of {kind}", partial(lasting.die, kind)))
    yield from sorted(events, key=lambda event: event[0])
    yield lasts_s, "end", lambda: None


if __name__ == "__main__":
    script(main)
