"""What an engine's own histograms say happened between two moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COLD_PATH = {
    "check": "mta_engine_check_seconds",
    "fuse": "mta_engine_fuse_seconds",
    "write into the slot": "mta_engine_slot_write_seconds",
}
"""The steps from a never-seen recipe to its adapter, by what they are called here, and the histograms of each."""

BLOCKING_STEPS = {"what the step waits for it": "mta_engine_bring_in_seconds"}
"""The part that everybody waits for; the rest may be done ahead, in a thread."""

FOLDER_LOADS = {"load from a folder": "mta_engine_load_seconds"}
"""vLLM's own way, for adapters that are not recipes."""


@dataclass(frozen=True, slots=True)
class Total:
    """What a histogram has counted, and its sum in seconds; labels are added up."""

    count: float = 0.0
    seconds: float = 0.0


def totals(text: str, names: Mapping[str, str]) -> dict[str, Total]:
    """The totals of some histograms of `/metrics`; one that is not there has counted nothing."""
    found = {}
    for called, name in names.items():
        sums = dict.fromkeys((f"{name}_count", f"{name}_sum"), 0.0)
        for line in text.splitlines():
            sample = line.partition("{")[0].partition(" ")[0]
            if sample in sums:
                sums[sample] += float(line.rpartition(" ")[2])
        found[called] = Total(*sums.values())
    return found


def means_ms(before: Mapping[str, Total], after: Mapping[str, Total]) -> dict[str, float]:
    """Mean of what was counted in between, ms; nothing where nothing was."""
    means = {}
    for called, total in after.items():
        counted = total.count - before[called].count
        if counted > 0:
            means[called] = 1000 * (total.seconds - before[called].seconds) / counted
    return means
