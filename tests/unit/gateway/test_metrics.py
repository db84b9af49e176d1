"""What the gateway counts, and that labels stay few."""

from __future__ import annotations

import re

from server.gateway.operating.metrics import Metrics


def shown(metrics: Metrics, name: str) -> list[str]:
    return [line for line in metrics.text().decode().splitlines() if line.startswith(f"{name}{{")]


def test_tenants_that_nobody_named_share_a_label() -> None:
    metrics = Metrics({"acme"})
    for tenant in ("acme", *(f"tenant-{n}" for n in range(100))):
        metrics.count_generation(tenant, "merged", 200, broken=False)
    assert [line for line in shown(metrics, "mta_generations_total") if "merged" in line] == [
        'mta_generations_total{level="merged",outcome="answered",tenant="acme"} 1.0',
        'mta_generations_total{level="merged",outcome="answered",tenant="other"} 100.0',
    ]


def test_a_generation_ends_as_its_status_says_and_a_first_failure_is_an_increase() -> None:
    metrics = Metrics({"acme"})
    unseen = 'mta_generations_total{level="",outcome="unavailable",tenant="acme"} 0.0'
    assert unseen in shown(metrics, "mta_generations_total")
    outcomes = {200: "answered", 400: "refused", 404: "refused", 429: "limited", 499: "gone", 503: "unavailable"}
    outcomes |= {500: "failed", 502: "failed"}
    for status in outcomes:
        metrics.count_generation("acme", str(status), status, broken=False)
    ended = re.findall(r'level="(\d+)",outcome="(\w+)"', metrics.text().decode())
    assert dict(ended) == {str(status): outcome for status, outcome in outcomes.items()}
