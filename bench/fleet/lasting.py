"""`mta bench fleet lasting`: hours of mixed load with deaths, backups, a change of bank and of the secret.

The fleet is that of `mta bench fleet rolling`, with a worker. Its load takes some 60 % of two cores, so that everything
is ready between two events. Memory and descriptors of each part are read all the time, since what grows slowly shows
only here. Bank and secret are exchanged early, and in the second half only the first gateway and the first engine die:
all other processes are old in the end.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import redis
import typer

from bench import script
from bench.fleet.chaos import census, verdict
from bench.fleet.chaos.faults import Fault, Outage
from bench.fleet.chaos.load import TIMEOUT_S, Crowd, ended
from bench.fleet.machine import is_whole
from bench.fleet.rolling import CALM_S, PEOPLE, READY_S, SECRET, Replaceable, RollingFleet
from bench.page.report import console, report
from bench.rig.processes import mta, wait_until
from server.store.rotation import GRACE_MS
from server.supervisor.services import free_port

CROWDS, CROWD = 6, 12
DEATHS = ("gateway", "engine", "router", "worker", "valkey")
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


@dataclass
class Lasting:
    """The fleet with a worker, and everything that happens to it."""

    fleet: RollingFleet
    worker: Replaceable
    folder: Path
    outages: list[Outage] = field(default_factory=list)

    def parts(self) -> dict[str, Replaceable]:
        """All parts that are processes of ours, by name."""
        numbered = {"gateway": self.fleet.gateways, "engine": self.fleet.engines}
        named = {f"{kind}-{n}": part for kind, parts in numbered.items() for n, part in enumerate(parts, 1)}
        return named | {"worker": self.worker}

    def die(self, kind: str) -> None:
        """Kill the first part of a kind, start it again as a supervisor would, and wait until it is ready."""
        begun_s = time.monotonic()
        if kind == "valkey":
            self.fleet.store.kill()
            self.fleet.store.start()
        elif kind == "router":
            self.fleet.router.send(signal.SIGKILL)
            self.fleet.restart_router()
        else:
            part = next(part for name, part in self.parts().items() if name.startswith(kind))
            part.kill()
            part.start(self.fleet.settings)
        wait_until(self.is_ready, f"all parts after the death of {kind}", READY_S)
        self.outages.append(Outage(Fault(kind), begun_s, time.monotonic()))

    def is_ready(self) -> bool:
        """Whether both gateways miss nothing."""
        return all(map(is_whole, self.fleet.gateway_urls))

    def read(self, at_s: float) -> Reading:
        """Read what all parts use now."""
        pids = {name: part.pid for name, part in self.parts().items()}
        pids |= {"router": self.fleet.router.process.pid, "valkey": self.fleet.store.pid}
        used = {name: census.usage_of(pid) for name, pid in pids.items()}
        return Reading(at_s, used, pids, census.kinds_of_keys(self.fleet.store.url).total())

    def back_up(self) -> None:
        self._command("backup", "--out", str(self.folder / "backups"))

    def change_bank(self) -> None:
        """Roll out the next bank, as docs/scaling.md says."""
        for what, exchange in self.fleet.steps():
            self._away(what.partition(",")[0], exchange)
        self.fleet.settings["MTA_BANK"] = str(self.fleet.next)
        self.worker.exchange(self.fleet.settings)

    def change_secret(self) -> None:
        """Exchange MTA_SECRET, as docs/security.md says."""
        for secret, then in ((f"{NEW_SECRET},{SECRET}", ("secret", "rotate")), (NEW_SECRET, ())):
            self.fleet.settings["MTA_SECRET"] = secret
            for gateway in self.fleet.gateways:
                self._away("gateway", partial(gateway.exchange, self.fleet.settings))
            if then:
                self._command(*then)
                time.sleep(GRACE_MS / 1000)

    def _away(self, kind: str, exchange: Callable[[], None]) -> None:
        begun_s = time.monotonic()
        exchange()
        self.outages.append(Outage(Fault(kind), begun_s, time.monotonic()))
        time.sleep(CALM_S)

    def _command(self, *words: str) -> None:
        given = {name: value for name, value in (os.environ | self.fleet.settings).items() if value is not None}
        done = subprocess.run(mta(*words), env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


class Reader(threading.Thread):
    """Reads what the parts use until `stop`."""

    def __init__(self, lasting: Lasting, every_s: float) -> None:
        super().__init__(daemon=True)
        self.readings: list[Reading] = []
        self._lasting, self._every_s = lasting, every_s
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        begun_s = time.monotonic()
        while not self._stop_asked.wait(self._every_s):
            if self._lasting.is_ready():
                with suppress(OSError, redis.RedisError):  # a part has died meanwhile
                    self.readings.append(self._lasting.read(time.monotonic() - begun_s))


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
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as parts:
        lasting = started(Path(scratch), parts)
        urls, store_url = lasting.fleet.gateway_urls, lasting.fleet.store.url
        keys_before = census.kinds_of_keys(store_url)
        crowds = [
            Crowd(urls[n % len(urls)], f"crowd-{n}", CROWD, f"{chance.random()}", pause_s=pause_s)
            for n in range(CROWDS)
        ]
        reader, begun_s, shown = Reader(lasting, READ_S), time.monotonic(), console()
        for thread in (*crowds, reader):
            thread.start()
        happened: list[tuple[str, float]] = []
        failed: list[verdict.Claim] = []
        with suppress(KeyboardInterrupt):
            for at_s, what, event in plan(lasting, chance, 60 * minutes, death_s, 60 * backup_minutes):
                time.sleep(max(0.0, begun_s + at_s - time.monotonic()))
                event_s = time.monotonic()
                happened.append((what, event_s - begun_s))
                try:
                    event()
                except AssertionError as error:
                    failed.append(verdict.Claim(what, str(error), False))
                    break
                shown.print(f"{(event_s - begun_s) / 60:6.1f} min  {what}: {time.monotonic() - event_s:.1f} s")
        lasted_s = time.monotonic() - begun_s
        asked, people = ended(crowds)
        reader.stop()
        settled, last = reader.readings[int(SETTLED_SHARE * len(reader.readings))], reader.readings[-1]
        lived = {name: used for name, used in settled.parts.items() if settled.pids[name] == last.pids[name]}
        with httpx.Client(base_url=urls[0], timeout=TIMEOUT_S) as client:
            claims = [
                *failed,
                *verdict.about_outages(lasting.outages),
                verdict.Claim("lived through the second half", ", ".join(lived), lived.keys() >= OLD),
                *verdict.about_requests(asked, lasting.outages),
                *verdict.about_promises(client, people),
                verdict.about_jobs(client, people),
                *verdict.about_growth(lived, last.parts),
                *verdict.after_erasing(client, people, store_url, keys_before, moved=len(people) + PEOPLE),
            ]
    readings = [
        {"at_s": one.at_s, "keys": one.keys, **{f"{name}, MiB": use.memory_mib for name, use in one.parts.items()}}
        for one in reader.readings
    ]
    title = f"{lasted_s / 60:.0f} minutes of load, {len(lasting.outages)} parts killed or exchanged, seed {seed}"
    rows = [claim.row for claim in claims]
    report(title, rows, out, bench="lasting", readings=readings, events=happened)


def started(folder: Path, parts: ExitStack) -> Lasting:
    """Start the fleet of `rolling` and a worker."""
    fleet = RollingFleet(folder, parts)
    port = free_port()
    worker = Replaceable(mta("worker"), f"http://127.0.0.1:{port}/metrics")
    fleet.settings["MTA_METRICS_PORT"] = str(port)
    worker.start(fleet.settings)
    parts.callback(worker.stop)
    return Lasting(fleet, worker, folder)


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
        kind = chance.choice(DEATHS if at_s < lasts_s / 2 - death_s else DEATHS[:2])
        events.append((at_s, f"death of {kind}", partial(lasting.die, kind)))
    yield from sorted(events, key=lambda event: event[0])
    yield lasts_s, "end", lambda: None


if __name__ == "__main__":
    script(main)
