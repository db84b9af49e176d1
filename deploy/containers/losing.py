"""A fleet: each container is killed from the host under load, and what that loses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import httpx

from bench.fleet.chaos import verdict
from bench.fleet.chaos.asking import End, Outcome
from bench.fleet.chaos.faults import Fault, Outage
from bench.fleet.chaos.load import TIMEOUT_S, Crowd, ended
from bench.fleet.chaos.verdict import Claim
from bench.page.report import console
from deploy.containers.site import Site

KILLED = {
    **dict.fromkeys(("engine", "engine-2"), "engine"),
    **dict.fromkeys(("worker", "worker-2"), "worker"),
    **dict.fromkeys(("gateway", "gateway-2"), "gateway"),
    **{"router": "router", "redis": "valkey"},
}
"""Services, and what the faults of `mta bench fleet chaos` call their kind."""

PEOPLE, CALM_S = 6, 5.0
NOTICED_S = 3.0
"""Seconds within which a gateway notices that a part is away: it looks every two."""


def lose(site: Site) -> list[Claim]:
    """Kill the program of each container while two crowds use a gateway each; return what was lost."""
    crowds = [Crowd(url, f"crowd-{n}", PEOPLE, f"{n}", headers=site.headers) for n, url in enumerate(site.urls)]
    outages: dict[str, Outage] = {}
    for crowd in crowds:
        crowd.start()
    for name, kind in KILLED.items():
        time.sleep(CALM_S)
        begun_s = time.monotonic()
        site.kill(name)
        time.sleep(NOTICED_S)
        site.wait()
        outages[name] = Outage(Fault(kind), begun_s, time.monotonic())
        console().print(f"killed: {name}, whole again after {outages[name].recovery_s:.0f} s")
    time.sleep(CALM_S)
    asked, people = ended(crowds)
    asked = [_explained(one, outages.values()) for one in asked]
    lost = [Claim(f"killed: {name}", _lost(asked, outage), True) for name, outage in outages.items()]
    with httpx.Client(base_url=site.urls[0], headers=site.headers, timeout=TIMEOUT_S) as client:
        promises = verdict.about_promises(client, people)
        jobs = verdict.about_jobs(client, people)
    return [*lost, *verdict.about_requests(asked, list(outages.values())), *promises, jobs]


def _explained(one: Outcome, outages: Iterable[Outage]) -> Outcome:
    """Count a timeout beside the death of a gateway as a lost connection: a container's network goes with it, and so
    may the last packet that would have told the client."""
    away = any(outage.fault.part == "gateway" and outage.during(one.begun_s, one.ended_s) for outage in outages)
    return replace(one, end=End.CUT) if away and one.reason.startswith("ReadTimeout") else one


def _lost(asked: list[Outcome], outage: Outage) -> str:
    """How requests ended that were open while a part was away."""
    beside = [one for one in asked if outage.during(one.begun_s, one.ended_s)]
    ends = Counter(one.end for one in beside if one.end is not End.ANSWERED)
    lost = ", ".join(f"{count} {end}" for end, count in ends.items()) or "nothing lost"
    return f"whole after {outage.recovery_s:.0f} s; of {len(beside)} requests: {lost}"
