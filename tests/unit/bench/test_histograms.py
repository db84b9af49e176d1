"""Means from an engine's histograms between two moments."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.serving.histograms import Total, means_ms, totals

NAMES = {"fuse": "mta_engine_fuse_seconds", "load": "mta_engine_load_seconds"}


class Metrics:
    """A registry with the histogram of fusing, one series for each kind of recipe, and one of a longer name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.fuse = Histogram(NAMES["fuse"], "Fusing.", ["kind"], registry=self.registry)
        self.other = Histogram("mta_engine_fuse_seconds_ahead", "Another.", registry=self.registry)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_labels_are_added_up_and_other_histograms_left_out(metrics: Metrics) -> None:
    metrics.fuse.labels("plain").observe(0.25)
    metrics.fuse.labels("stacked").observe(0.5)
    metrics.other.observe(8)
    assert totals(metrics.text(), NAMES) == {"fuse": Total(2, 0.75), "load": Total()}


def test_a_mean_is_of_what_was_counted_in_between(metrics: Metrics) -> None:
    metrics.fuse.labels("plain").observe(4)
    before = totals(metrics.text(), NAMES)
    metrics.fuse.labels("plain").observe(0.001)
    metrics.fuse.labels("stacked").observe(0.003)
    assert means_ms(before, totals(metrics.text(), NAMES)) == pytest.approx({"fuse": 2.0})


def test_what_was_not_counted_has_no_mean(metrics: Metrics) -> None:
    before = totals(metrics.text(), NAMES)
    assert means_ms(before, before) == {}
