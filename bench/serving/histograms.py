"""Read an engine's own histograms, and compute means between two readings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.rig.client import summed

COLD_PATH = {
    "check": "mta_engine_check_seconds",
    "fuse": "mta_engine_fuse_seconds",
    "write into the slot": "mta_engine_slot_write_seconds",
}
"""Names of the steps from a new recipe to its adapter, and their histograms."""

BLOCKING_STEPS = {"what the step waits for it": "mta_engine_bring_in_seconds"}
"""The step that blocks all requests; the others can run ahead in a thread."""


@dataclass(frozen=True, slots=True)
class Total:
    """Count and sum (in seconds) of a histogram over all labels."""

    count: float = 0.0
    seconds: float = 0.0


def totals(text: str, names: Mapping[str, str]) -> dict[str, Total]:
    """Return the totals of some histograms of `/metrics`; a missing one counts as empty."""
    return {called: Total(summed(text, f"{name}_count"), summed(text, f"{name}_sum")) for called, name in names.items()}


def means_ms(before: Mapping[str, Total], after: Mapping[str, Total]) -> dict[str, float]:
    """Return the means in ms between two readings, without histograms that did not count."""
    means = {}
    for called, total in after.items():
        counted = total.count - before[called].count
        if counted > 0:
            means[called] = 1000 * (total.seconds - before[called].seconds) / counted
    return means
