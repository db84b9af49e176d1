"""`mta bench fleet simulate`: the share of requests that find their recipe warm, and the balance of requests, with 10,
100 and 1,000 engines.

Users ask with the frequencies of Zipf's law, each with their own recipe: the worst case, since similar users share one.
The router's ring (`ring.py`) or, for comparison, chance selects the engine. An engine keeps the most recently used
recipes. `--check` compares the simulation with two real engines behind the real router.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import numpy.typing as npt
import typer

from bench import script
from bench.fleet.exercise.machine import ENGINES, engine_of, tiny_machine
from bench.fleet.ring import Ring, random_places
from bench.page.report import Figures, tabulate
from bench.rig.engine import KEY

REPLICAS = (10, 100, 1000)
EXPONENT = 0.6
"""Of Zipf's law."""
CHECKED_REQUESTS, CHECKED_RECIPES, CHECKED_HELD, CHECKED_SLOTS = 400, 60, 16, 8
NEAR = 0.02
"""Maximum difference between the real and the simulated share of warm requests."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spread:
    """The result of serving all requests."""

    warm: float  # share of requests whose engine held their recipe
    busiest: float  # requests of the busiest engine over the mean
    idlest: float  # requests of the least busy engine over the mean


def zipf(users: int, requests: int, exponent: float, generator: np.random.Generator) -> Numbers:
    """Draw the user of each request: user n asks about 1/n^exponent as often as the first."""
    fractions = np.cumsum(1.0 / np.arange(1, users + 1) ** exponent)
    who: Numbers = np.searchsorted(fractions, generator.random(requests) * fractions[-1]).astype(np.int64)
    return who


def served(asking: Numbers, engines: Numbers, replicas: int, held: int, begin: int = 0) -> Spread:
    """Serve requests in order, and count those from `begin` on. An engine keeps `held` recipes."""
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
    warm = 0
    for number, (recipe, engine) in enumerate(zip(asking.tolist(), engines.tolist(), strict=True)):
        mine = kept[engine]
        if recipe in mine:
            warm += number >= begin
            mine.move_to_end(recipe)
        else:
            mine[recipe] = None
            if len(mine) > held:
                mine.popitem(last=False)
    loads = np.bincount(engines, minlength=replicas) / (len(engines) / replicas)
    return Spread(warm / (len(asking) - begin), float(loads.max()), float(loads.min()))


def main(
    *,
    replicas: Annotated[list[int], typer.Option(help="Number of engines; may be repeated.")] = REPLICAS,  # type: ignore[assignment]
    users: Annotated[int, typer.Option(help="Users, each with their own recipe.", min=1000)] = 1_000_000,
    requests: Annotated[int, typer.Option(help="Requests per engine; the second half counts.", min=100)] = 6000,
    held: Annotated[int, typer.Option(help="Recipes kept per engine (MTA_MAX_CPU_LORAS).", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    check: Annotated[bool, typer.Option(help="Compare with two real engines.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Simulate fleets and print warm shares and balance; exit status 1 if `--check` finds a difference."""
    title = f"{users:,} users, Zipf {EXPONENT}, {requests:,} requests and {held:,} recipes an engine"
    columns = ("engines", "warm by the ring", "warm anywhere", "busiest", "idlest", "busiest after a death")
    tables = [Figures(title, columns, [_line(number, users, requests, held, seed) for number in replicas])]
    good = True
    if check:
        checks = checked(seed)
        good = checks.misplaced == 0 and abs(checks.warm - checks.simulated) <= NEAR
        rows = [
            ["recipes elsewhere than simulated", checks.misplaced],
            ["share of requests that were warm", checks.warm],
            ["the same, simulated", checks.simulated],
        ]
        tables.append(Figures(f"two real engines, {CHECKED_REQUESTS} requests", ("", "found"), rows))
    tabulate(tables, out)
    if not good:
        raise typer.Exit(1)


def _line(replicas: int, users: int, requests: int, held: int, seed: int) -> list[object]:
    generator = np.random.default_rng(seed)
    asking = zipf(users, replicas * requests, EXPONENT, generator)
    places = random_places(users, generator)[asking]
    names = [f"http://10.{number >> 8}.{number & 255}.1:8001" for number in range(replicas)]
    by_ring = Ring(names).engines_at(places)
    half = len(asking) // 2
    ring = served(asking, by_ring, replicas, held, half)
    anywhere = served(asking, generator.integers(replicas, size=len(asking)), replicas, held, half)
    # The router rebuilds the ring without an unreachable engine, whose users are spread over all others.
    after = Ring(names[1:]).engines_at(places) + 1
    left = np.bincount(after, minlength=replicas)[1:] / (len(after) / replicas)
    return [replicas, ring.warm, anywhere.warm, ring.busiest, ring.idlest, float(left.max())]


@dataclass(frozen=True, slots=True)
class Checked:
    """Comparison of the simulation with two real engines."""

    misplaced: int  # number of recipes on another engine than simulated
    warm: float  # share of warm requests
    simulated: float  # simulated share of warm requests


def checked(seed: int) -> Checked:
    """Send requests for more recipes than two engines hold, one at a time through the real router."""
    generator = np.random.default_rng(seed)
    asking = zipf(CHECKED_RECIPES, CHECKED_REQUESTS, 0.9, generator)
    options = ("--max-loras", str(CHECKED_SLOTS))
    environment = {"MTA_MAX_CPU_LORAS": str(CHECKED_HELD)}
    with (
        tempfile.TemporaryDirectory() as scratch,
        tiny_machine(Path(scratch), *options, environment=environment) as machine,
    ):
        parts = httpx.get(f"{machine.up.url}/ready").json()["parts"]
        urls, short = [engine["url"] for engine in parts["engines"]], parts["bank"]["fingerprint"][:8]
        recipes = [f"mta3:{short}:shared:c+a00*{n + 1}+a01*{900 - n}" for n in range(CHECKED_RECIPES)]
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=parts["engine_url"]["url"], headers=headers, timeout=60) as router:
            for number in asking.tolist():
                body = {"model": recipes[number], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
                session = {"X-Session-ID": recipes[number]}
                router.post("/v1/chat/completions", json=body, headers=session).raise_for_status()
        ring = Ring(urls)
        engines = np.array([ring.engine_of(recipes[number]) for number in asking.tolist()])
        misplaced, prepares, fuses = 0, 0, 0
        for number, name in enumerate(ENGINES):
            with engine_of(machine.up, name) as engine:
                resident = engine.resident()["resident"]
                engine.client.get("/metrics").raise_for_status()  # updates the counters that the status reports
                status = engine.status()
            misplaced += sum(ring.engine_of(recipe) != number for recipe in resident if recipe in recipes)
            prepares, fuses = prepares + status["prepares"], fuses + status["fuses"]
    simulated = served(asking, engines, len(ENGINES), CHECKED_HELD)
    return Checked(misplaced, 1 - fuses / prepares, simulated.warm)


if __name__ == "__main__":
    script(main)
