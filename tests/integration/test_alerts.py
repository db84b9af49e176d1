"""Each alert on a rate, tried against the first burst of what it is about, as a part that has just started shows it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.admission.metrics import AdapterMetrics
from server.engine.fusing.metrics import FusionMetrics
from server.gateway.experiments.arms import Level
from server.gateway.operating.metrics import Metrics
from server.worker.loops import WorkerMetrics
from tests.support.observe.prometheus import BINARY, CONFIGURATION

ALERTS = CONFIGURATION / "alerts.yml"
Samples = dict[str, float]  # by name and labels, as PromQL writes them
Burst = Callable[[], tuple[Samples, Samples]]  # gives what there is at the start of a part, and after a burst


def samples_of(text: bytes, job: str) -> Samples:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = {"job": job, "instance": "i", **sample.labels}
            written = ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items())
            found[f"{sample.name}{{{written}}}"] = sample.value
    return found


def gateway(burst: Callable[[Metrics], object]) -> Burst:
    def tried() -> tuple[Samples, Samples]:
        metrics = Metrics({"acme"}, Level)
        before = samples_of(metrics.text(), "gateway")
        for _ in range(30):
            burst(metrics)
        return before, samples_of(metrics.text(), "gateway")

    return tried


def generations(level: str, status: int, *, broken: bool = False) -> Burst:
    return gateway(lambda metrics: metrics.count_generation("acme", level, status, broken=broken))


def jobs(outcome: str) -> Burst:
    def tried() -> tuple[Samples, Samples]:
        metrics = WorkerMetrics()
        before = samples_of(generate_latest(metrics._registry), "worker")
        metrics.jobs.labels(outcome).inc(5)
        return before, samples_of(generate_latest(metrics._registry), "worker")

    return tried


def evictions() -> tuple[Samples, Samples]:
    worker, names, registry = FusionMetrics(), MagicMock(shared=0, leased=0), CollectorRegistry()
    published = AdapterMetrics(MagicMock(), names, slots=2)
    registry.register(published)
    before = samples_of(generate_latest(registry), "engine")
    for _ in range(100):
        worker.evictions.inc()
        worker.fuse.observe(0.01)
    published._worker_text = worker.text
    return before, samples_of(generate_latest(registry), "engine")


BURSTS: list[tuple[str, Burst]] = [
    ("MtaGenerationsFail", generations("", 503)),
    ("MtaGenerationsFail", generations("", 500)),
    ("MtaGenerationsFail", generations("base", 200, broken=True)),
    ("MtaGenerationsFail", generations("stacked", 200, broken=True)),
    ("MtaGenerationsFail", generations("merged", 502)),
    ("MtaStoreFails", gateway(lambda metrics: metrics.store("command", 0.1, True))),
    ("MtaStoreFails", gateway(lambda metrics: metrics.store("write", 0.1, True))),
    ("MtaStoreSlow", gateway(lambda metrics: metrics.store("write", 2, False))),
    ("MtaFirstTokenSlow", gateway(lambda metrics: metrics.ttft.labels("stacked").observe(20))),
    ("MtaFallbacks", gateway(lambda metrics: metrics.fallbacks.inc())),
    ("MtaOverloaded", gateway(lambda metrics: metrics.count_refusal("queue_full"))),
    ("MtaOverloaded", gateway(lambda metrics: metrics.count_refusal("queue_timeout"))),
    ("MtaJobsFail", jobs("failed")),
    ("MtaJobsFail", jobs("given up")),
    ("MtaSlotsThrash", evictions),
]


@pytest.mark.skipif(BINARY is None, reason="Prometheus is not installed (Debian: prometheus)")
def test_the_first_burst_is_seen_by_its_alert(tmp_path: Path) -> None:
    tests = []
    for number, (alert, burst) in enumerate(BURSTS):
        before, after = burst()
        values = {name: f"{before.get(name, '_')}x20 {value}x20" for name, value in after.items()}
        series = [{"series": name, "values": each} for name, each in values.items() if name.startswith("mta_")]
        seen = {"expr": f'count(ALERTS{{alertname="{alert}"}})', "eval_time": "330s"}  # after the burst's second sample
        seen["exp_samples"] = [{"labels": "{}", "value": 1}]
        tests.append(
            {"name": f"{number}: {alert}", "interval": "15s", "input_series": series, "promql_expr_test": [seen]}
        )
    file = tmp_path / "bursts.yml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "15s", "tests": tests}), "utf-8")
    done = subprocess.run(("promtool", "test", "rules", str(file)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_on_a_rate_is_tried() -> None:
    pattern = re.compile(r"- alert: (\w+)\s+expr: (.*?)\n {8}(?:for|labels):", re.DOTALL)
    rules = pattern.findall(ALERTS.read_text("utf-8"))
    assert {name for name, expression in rules if re.search(r"(rate|increase)\(", expression)} == {a for a, _ in BURSTS}
