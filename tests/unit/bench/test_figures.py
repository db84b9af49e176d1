"""What benchmarks read, print and write: histograms, spreads, percentiles, values in tables, the JSON of pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench.page.report import Figures, Spread, command_line, percentile, report, shown, tabulate
from bench.serving.histograms import Total, means_ms, totals

NAMES = {"fuse": "mta_engine_fuse_seconds", "load": "mta_engine_load_seconds"}


def test_a_ratio_is_taken_pair_by_pair() -> None:
    ratio = Spread.ratio([10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert (ratio.median, ratio.min, ratio.max, ratio.n) == (1.0, 0.5, 3.0, 3)
    with pytest.raises(ValueError, match="longer"):
        Spread.ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_percentile_is_one_of_the_readings(share: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == expected
    assert percentile([7.0], share) == 7.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0423, "0.042"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (0.0, "0"), (-3.456, "-3.46")),
        *((1000, "1,000"), (True, "yes"), (None, "–"), ("as it is", "as it is")),
        (Spread(1.5, 1.0, 123.4, 5), "1.50 (1.00 to 123)"),
        ({"median": 1.5, "min": 1.0, "max": 123.4, "n": 5}, "1.50 (1.00 to 123)"),
    ],
)
def test_values_are_shown_with_a_few_digits(value: object, text: str) -> None:
    assert shown(value) == text


def test_tables_and_rows_are_written_with_the_machine_and_the_command(tmp_path: Path) -> None:
    spread, out = Spread.of([1.0, 2.0, 4.0]), tmp_path / "made" / "cost.json"
    values = {"median": 2.0, "min": 1.0, "max": 4.0, "n": 3}
    tabulate([Figures("A title", ("what", "ms"), [["row", spread]])], out, bench="cost", pairs=3)
    content = json.loads(out.read_text("utf-8"))
    assert content["tables"] == [{"title": "A title", "columns": ["what", "ms"], "lines": [["row", values]]}]
    assert (content["bench"], content["pairs"], content["command"]) == ("cost", 3, command_line())
    assert content["machine"].keys() == {"processor", "cores", "amx", "avx512_bf16", "versions"}
    report("A title", [("a", spread), ("b", "text")], out, bench="cold")
    assert json.loads(out.read_text("utf-8"))["rows"] == {"a": values, "b": "text"}


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
