"""Checks of a fleet: each container is killed or replaced under load, and an alert tells of an engine that died."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx

from bench.fleet.exercise import claims as judging
from bench.fleet.exercise.asking import End, Outcome
from bench.fleet.exercise.claims import Claim
from bench.fleet.exercise.crowds import TIMEOUT_S
from bench.fleet.exercise.faults import Exercise, Outage
from bench.fleet.exercise.replacing import know_people, replace_all
from bench.page.report import console
from bench.rig.processes import wait_until
from deploy.containers.images import OBSERVERS
from deploy.containers.site import Site
from deploy.containers.tool import ContainerError

PEOPLE, CALM_S = 6, 5.0
TARGETS = {"gateway": 2, "engine": 2, "router": 1, "worker": 2}
DEAD, ALERT = "engine-2", "MtaPartGone"
SEEN_S, ALERT_S, KNOWN_S = 120.0, 600.0, 150.0
"""Seconds: until all are read; until the alert; for which the engine is known before it dies (the alert goes by the
median of the last minutes)."""


def deaths(site: Site) -> list[Claim]:
    """Kill the program of each container while two crowds use a gateway each; return what was lost."""
    exercise = Exercise(site, len(site.urls), PEOPLE, random.Random(0))
    exercise.start()
    for name in site.names:
        time.sleep(CALM_S)
        outage = exercise.strike(name)
        console().print(f"killed: {name}, whole again after {outage.recovery_s:.0f} s")
    time.sleep(CALM_S)
    asked, people = exercise.stop()
    asked = [_explained(one, exercise.outages) for one in asked]
    lost = zip(site.names, exercise.outages, strict=True)
    with httpx.Client(base_url=site.urls[0], headers=site.headers, timeout=TIMEOUT_S) as client:
        kept = judging.about_load(client, asked, people, exercise.outages)
    return [*(Claim(f"killed: {name}", outage.lost(asked), True) for name, outage in lost), *kept]


def _explained(one: Outcome, outages: Iterable[Outage]) -> Outcome:
    """Count a timeout beside the death of a gateway as a lost connection: a container's network goes with it, and so
    may the last packet that would have told the client."""
    away = any(outage.fault.kind == "gateway" and outage.during(one.begun_s, one.ended_s) for outage in outages)
    return replace(one, end=End.CUT) if away and one.reason.startswith("ReadTimeout") else one


def replacement(site: Site) -> list[Claim]:
    """Let new images take the place of the running ones under load, in the order that docs/deploying.md gives."""
    know_people(site)
    site.make_next_images()
    found = replace_all(site)
    old = site.of_old_images()
    return [*found, Claim("services that run an old image", ", ".join(old) or "none", not old)]


def alerts(site: Site) -> list[Claim]:
    """Let Prometheus read everybody's metrics, and an alert reach Alertmanager when an engine dies."""
    site.settings["MTA_ADMIN_KEY"] = site.command("keys", "create", "prometheus", "--scope", "admin")
    site.compose("--profile", "fleet", "--profile", "observe", "up", "-d", "--no-deps", *OBSERVERS)
    wait_until(lambda: _up(site) == TARGETS, "Prometheus to read everybody's metrics", SEEN_S)
    claims = [Claim("read by Prometheus", ", ".join(f"{n} {job}" for job, n in TARGETS.items()), True)]
    time.sleep(KNOWN_S)
    claims.append(Claim("alerts while all is well", ", ".join(_alerts(site)) or "none", not _alerts(site)))
    begun_s = time.monotonic()
    site.compose("kill", DEAD)
    wait_until(lambda: ALERT in _alerts(site), f"{ALERT} in Alertmanager", ALERT_S)
    claims.append(Claim(f"{ALERT} after the death of {DEAD}", f"{time.monotonic() - begun_s:.0f} s", True))
    site.compose("up", "-d", "--no-deps", DEAD)
    site.wait()
    wait_until(lambda: _up(site) == TARGETS, "Prometheus to read the engine's metrics again", SEEN_S)
    wait_until(lambda: ALERT not in _alerts(site), f"{ALERT} to end", ALERT_S)
    claims.append(Claim(f"{ALERT} once {DEAD} is started again", "over", True))
    return claims


def _up(site: Site) -> dict[str, int]:
    """Number of targets by job that Prometheus reads."""
    command = ("promtool", "query", "-o", "json", "instant", "http://127.0.0.1:9090", "sum by (job) (up)")
    return {one["metric"]["job"]: int(one["value"][1]) for one in _asked(site, "prometheus", command)}


def _alerts(site: Site) -> list[str]:
    """Names of the alerts that Alertmanager would send."""
    command = ("amtool", "--alertmanager.url=http://127.0.0.1:9093", "alert", "query", "-o", "json")
    return sorted({one["labels"]["alertname"] for one in _asked(site, "alertmanager", command)})


def _asked(site: Site, service: str, command: tuple[str, ...]) -> list[dict[str, Any]]:
    with suppress(ContainerError, ValueError):  # it has only just been started
        found: list[dict[str, Any]] = json.loads(site.tool.run("exec", site.container(service), *command))
        return found
    return []
