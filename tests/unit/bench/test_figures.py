"""What benchmarks print and write: spreads, percentiles, values as tables show them, the JSON of pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.page.report import Figures, Spread, command_line, percentile, report, shown, tabulate


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
        (0.0423, "0.042"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (-3.456, "-3.46"),
        (1000, "1,000"),
        (True, "yes"),
        (None, "–"),
        ("as it is", "as it is"),
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
