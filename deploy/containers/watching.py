"""A fleet: a real Prometheus reads everybody's metrics, and an alert reaches Alertmanager when an engine dies."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from bench.fleet.chaos.verdict import Claim
from bench.rig.processes import wait_until
from deploy.containers.images import OBSERVERS
from deploy.containers.site import Site
from deploy.containers.tool import ContainerError

TARGETS = {"gateway": 2, "engine": 2, "router": 1, "worker": 2}
DEAD, ALERT = "engine-2", "MtaPartGone"
SEEN_S, ALERT_S, KNOWN_S = 120.0, 600.0, 150.0
"""Seconds: until all are read; until the alert; for which the engine is known before it dies (the alert goes by the
median of the last minutes)."""


def watch(site: Site) -> list[Claim]:
    """Start Prometheus and Alertmanager beside a fleet, and let an engine die."""
    site.settings["MTA_ADMIN_KEY"] = site.compose(
        "exec", "-T", "gateway", "mta", "keys", "create", "prometheus", "--scope", "admin"
    ).strip()
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
