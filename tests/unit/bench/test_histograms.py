"""Means from an engine's histograms between two moments."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.serving.histograms import Total, means_ms, totals

NAMES = {"fuse": "mta_engine_fuse_seconds", "load": "mta_engine_load_seconds"}


def test_means_are_of_what_was_counted_in_between_over_all_labels_of_a_histogram() -> None:
    registry = CollectorRegistry()
    fuse = Histogram(NAMES["fuse"], "Fusing.", ["kind"], registry=registry)
    Histogram("mta_engine_fuse_seconds_ahead", "Another, of a longer name.", registry=registry).observe(8)

    def now() -> dict[str, Total]:
        return totals(generate_latest(registry).decode(), NAMES)

    fuse.labels("plain").observe(0.25)
    fuse.labels("stacked").observe(0.5)
    before = now()
    assert before == {"fuse": Total(2, 0.75), "load": Total()}
    assert means_ms(before, before) == {}
    fuse.labels("plain").observe(0.001)
    fuse.labels("stacked").observe(0.003)
    assert means_ms(before, now()) == pytest.approx({"fuse": 2.0})
