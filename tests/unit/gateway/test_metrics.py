"""What the gateway counts, and that labels stay few."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "answered"),
        (400, "refused"),
        (404, "refused"),
        (429, "limited"),
        (499, "gone"),
        (500, "failed"),
        (502, "failed"),
        (503, "unavailable"),
    ],
)
def test_a_generation_ends_as_its_status_says(status: int, outcome: str) -> None:
    metrics = Metrics()
    metrics.count_generation("a", "base", status, broken=False)
    [line] = [line for line in shown(metrics, "mta_generations_total") if "base" in line]
    assert f'outcome="{outcome}"' in line


def test_a_first_failure_is_an_increase() -> None:
    lines = shown(Metrics({"acme"}), "mta_generations_total")
    assert 'mta_generations_total{level="",outcome="unavailable",tenant="acme"} 0.0' in lines
