"""A real Prometheus for processes of this machine, with our own configuration and short intervals."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.rig.processes import answers, running, wait_until
from deploy.observe.dashboard import WINDOW
from server.supervisor.services import free_port

CONFIGURATION = Path(__file__).parents[3] / "deploy/observe"
HURRY_S = 1
BINARY = shutil.which("prometheus")
"""Path of Prometheus, or None if it is not installed."""


@dataclass(frozen=True, slots=True)
class Target:
    """The address of a process with metrics, and its key."""

    address: str
    key: str = ""


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)

    def asked(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression now, with one value per series."""
        series: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return series

    def over_time(self, expression: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """Evaluate an expression over a time range; replaces Grafana's variable for the rate window."""
        asked: dict[str, Any] = {"query": expression.replace(WINDOW, f"{4 * HURRY_S}s"), "start": start_s, "end": end_s}
        series: list[dict[str, Any]] = self._get("query_range", **asked, step=HURRY_S)["result"]
        return series

    def firing(self) -> set[str]:
        """Return the names of the firing alerts."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def up(self, job: str) -> bool:
        """Whether a job has targets and the last scrape of all of them succeeded."""
        up = self.asked(f'min(up{{job="{job}"}})')
        return bool(up) and up[0]["value"][1] == "1"

    def looked(self) -> None:
        """Wait until all targets have been scraped twice more."""
        start_s = time.time()
        wait_until(
            lambda: self.asked(f"min(timestamp(up)) > bool {start_s + 2 * HURRY_S}")[0]["value"][1] == "1", "a look"
        )

    def _get(self, what: str, **parameters: str | float) -> dict[str, Any]:
        answer = self._http.get(f"/api/v1/{what}", params=parameters).json()
        assert answer["status"] == "success", answer
        data: dict[str, Any] = answer["data"]
        return data


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, Target]) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes every second. Alerts fire at once, and 2 s count as a long wait of a job.

    Args:
        folder: folder for its files.
        targets: targets by the names of the jobs in prometheus.yml; other jobs are left out.
    """
    assert BINARY, "prometheus is not installed"
    rules = (CONFIGURATION / "alerts.yml").read_text("utf-8")
    rules = re.sub(r"for: \w+", "for: 0s", rules).replace("oldest_seconds) > 600", "oldest_seconds) > 2")
    (folder / "alerts.yml").write_text(rules, "utf-8")
    config = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": f"{HURRY_S}s", "evaluation_interval": f"{HURRY_S}s"}
    del config["alerting"]
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    for job in config["scrape_configs"]:
        target = targets[job["job_name"]]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [target.address]}]
        if "authorization" in job:
            key = folder / f"{job['job_name']}.key"
            key.write_text(target.key, "utf-8")
            job["authorization"]["credentials_file"] = str(key)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    address = f"127.0.0.1:{free_port()}"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "metrics",
        "web.listen-address": address,
        "log.level": "warn",
    }
    with running([BINARY, *(f"--{name}={value}" for name, value in options.items())], {}):
        server = Prometheus(f"http://{address}")
        wait_until(lambda: answers(f"http://{address}/-/ready"), "Prometheus to start")
        yield server
