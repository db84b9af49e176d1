"""`mta bench fleet chaos`: five minutes of mixed load while every part is killed and paused."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer

from bench import script
from bench.fleet.chaos import census, verdict
from bench.fleet.chaos.faults import Fault, Faults, shuffled
from bench.fleet.chaos.load import TIMEOUT_S, Crowd, Imports, ended
from bench.fleet.chaos.verdict import Claim
from bench.fleet.machine import Machine, tiny_machine
from bench.page.report import console, report
from bench.rig.processes import descendants

CROWDS, CROWD = 6, 8
WARM_UP_S = 5.0
LOSES = 0.001
CALM_S = (0.5, 2.0)
"""Range of seconds between two faults."""


def main(
    minutes: Annotated[float, typer.Option(help="Minimum duration; the run ends after the last fault.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the faults and of people's requests.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Kill and pause every part under mixed load; exit status 1 if a guarantee is broken."""
    faults = shuffled(random.Random(seed))
    with tempfile.TemporaryDirectory() as scratch:
        with tiny_machine(Path(scratch), seed=seed) as machine:
            claims = under_load(Plan(Path(scratch), faults, seed, LOSES, 60 * minutes), machine)
            family = [machine.up.pid, *descendants(machine.up.pid)]
        left = census.left_over(family)
        claims.append(Claim("processes left behind", f"{len(left)} of {len(family)}", not left))
    report(f"chaos, seed {seed}, {len(faults)} faults", [claim.row for claim in claims], out)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run."""

    folder: Path  # for the files of imported people
    faults: Sequence[Fault]  # in order
    seed: int  # seed of everything random
    loses: float  # share of the store's answers that get lost
    lasts_s: float = 0  # minimum duration of the load in seconds


def under_load(plan: Plan, machine: Machine) -> list[Claim]:
    """Inflict the faults under load, and return every claim with its finding."""
    chance = random.Random(plan.seed)
    crowds = [Crowd(machine.up.url, f"crowd-{number}", CROWD, f"{chance.random()}") for number in range(CROWDS)]
    imports = Imports(machine.up.url, plan.folder)
    begun_s, shown = time.monotonic(), console()
    keys_before = census.kinds_of_keys(machine.store.url)
    for thread in (*crowds, imports):
        thread.start()
    time.sleep(WARM_UP_S)
    before, machine.lossy.share = census.usage(machine), plan.loses
    inflicting = Faults(machine, chance)
    for fault in plan.faults:
        outage = inflicting.inflict(fault)
        shown.print(f"{time.monotonic() - begun_s:6.1f} s  {fault.part:<8} whole again after {outage.recovery_s:.1f} s")
        time.sleep(chance.uniform(*CALM_S))
    time.sleep(max(0.0, begun_s + plan.lasts_s - time.monotonic()))
    machine.lossy.share = 0.0
    imports.stop()
    asked, people = ended(crowds)
    imports.join(2 * TIMEOUT_S)
    assert not imports.is_alive(), "imports hang"
    after = census.usage(machine)
    with httpx.Client(base_url=machine.up.url, timeout=TIMEOUT_S) as client:
        claims = [
            *verdict.about_requests(asked, inflicting.outages),
            *verdict.about_outages(inflicting.outages),
            Claim("answers of the store that were lost", str(machine.lossy.lost), True),
            Claim("files whose import failed", f"{imports.failures or 0}", not imports.failures),
            *verdict.about_promises(client, [*people, *imports.people]),
            verdict.about_jobs(client, people),
            *verdict.about_growth(before, after),
            *verdict.after_erasing(client, [*people, *imports.people], machine.store.url, keys_before),
        ]
    return claims


if __name__ == "__main__":
    script(main)
