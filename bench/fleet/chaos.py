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
from bench.fleet.exercise import census, claims
from bench.fleet.exercise.census import Usage
from bench.fleet.exercise.claims import Claim
from bench.fleet.exercise.crowds import TIMEOUT_S, Imports
from bench.fleet.exercise.faults import Exercise, Fault, shuffled
from bench.fleet.exercise.machine import Machine, tiny_machine
from bench.page.report import console, report
from bench.rig.processes import descendants

CROWDS, CROWD = 6, 8
WARM_UP_S = 5.0
LOST_SHARE = 0.001
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
            found = under_load(Plan(Path(scratch), faults, seed, LOST_SHARE, 60 * minutes), machine)
            family = [machine.up.pid, *descendants(machine.up.pid)]
        left = census.left_over(family)
        found.append(Claim("processes left behind", f"{len(left)} of {len(family)}", not left))
    report(f"chaos, seed {seed}, {len(faults)} faults", [claim.row for claim in found], out)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run."""

    folder: Path  # for the files of imported people
    faults: Sequence[Fault]  # in order
    seed: int  # seed of everything random
    lost_share: float  # share of the store's answers that get lost
    min_s: float = 0  # minimum duration of the load in seconds


def under_load(plan: Plan, machine: Machine) -> list[Claim]:
    """Inflict the faults under load, and return every claim with its finding."""
    chance = random.Random(plan.seed)
    exercise, imports = Exercise(machine, CROWDS, CROWD, chance), Imports(machine.up.url, plan.folder)
    begun_s = time.monotonic()
    keys_before = census.kinds_of_keys(machine.store.url)
    exercise.start()
    imports.start()
    time.sleep(WARM_UP_S)
    before, machine.lossy.share = _usage(machine), plan.lost_share
    for fault in plan.faults:
        recovery_s = exercise.inflict(fault).recovery_s
        passed_s = time.monotonic() - begun_s
        console().print(f"{passed_s:6.1f} s  {fault.kind:<8} whole again after {recovery_s:.1f} s")
        time.sleep(chance.uniform(*CALM_S))
    time.sleep(max(0.0, begun_s + plan.min_s - time.monotonic()))
    machine.lossy.share = 0.0
    imports.stop()
    asked, people = exercise.stop()
    imports.join(2 * TIMEOUT_S)
    assert not imports.is_alive(), "imports hang"
    people += imports.people
    after = _usage(machine)
    with httpx.Client(base_url=machine.up.url, timeout=TIMEOUT_S) as client:
        return [
            *claims.about_outages(exercise.outages),
            Claim("answers of the store that were lost", str(machine.lossy.lost), True),
            Claim("files whose import failed", f"{imports.failures or 0}", not imports.failures),
            *claims.about_load(client, asked, people, exercise.outages),
            *claims.about_growth(before, after),
            *claims.after_erasing(client, people, machine.store.url, keys_before),
        ]


def _usage(machine: Machine) -> dict[str, Usage]:
    """Return what `mta up` alone, and each of its parts, uses now."""
    parts = {name: census.usage(machine.processes(name)) for name in machine.names if name != "valkey"}
    return {"mta up": census.usage([machine.up.pid]), **parts}


if __name__ == "__main__":
    script(main)
