"""What benchmarks write, and pages that are filled with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from adapters.errors import MtaError
from bench.page.__main__ import main, read_results
from bench.page.markdown import fill
from bench.page.report import Figures, Spread, command_line, marked, percentile, report, shown, tabulate
from bench.rig.steps import OWN_VERDICT, judge
from bench.serving.cost import COLUMNS
from bench.serving.histograms import Total, means_ms, totals

PAGE = """# Performance

Before.

<!-- figures: cost -->
stale | table
<!-- end of figures -->

Between.

<!-- figures: scale -->
not measured yet
<!-- end of figures -->
"""


def test_ratio_is_taken_by_pairs_and_percentile_is_a_reading() -> None:
    ratio = Spread.ratio([10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert (ratio.median, ratio.min, ratio.max, ratio.n) == (1.0, 0.5, 3.0, 3)
    with pytest.raises(ValueError, match="longer"):
        Spread.ratio([1.0], [1.0, 2.0])
    readings = [float(n) for n in range(100, 0, -1)]
    assert [percentile(readings, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.5) == 7.0


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


def test_tables_and_rows_are_written_with_machine_and_command(tmp_path: Path) -> None:
    spread, out = Spread.of([1.0, 2.0, 4.0]), tmp_path / "made" / "cost.json"
    values = {"median": 2.0, "min": 1.0, "max": 4.0, "n": 3}
    tabulate([Figures("A title", ("what", "ms"), [["row", spread]])], out, bench="cost", pairs=3)
    content = json.loads(out.read_text("utf-8"))
    assert content["tables"] == [{"title": "A title", "columns": ["what", "ms"], "lines": [["row", values]]}]
    assert (content["bench"], content["pairs"], content["command"]) == ("cost", 3, command_line())
    assert content["machine"].keys() == {"processor", "cores", "amx", "avx512_bf16", "gpus", "versions"}
    report("A title", [("a", spread), ("b", "text")], out, bench="cold")
    assert json.loads(out.read_text("utf-8"))["rows"] == {"a": values, "b": "text"}


def test_wrong_value_is_marked_and_fails_the_run_after_writing(tmp_path: Path) -> None:
    out = tmp_path / "claims.json"
    report("Claims", [("failed", marked(0, True)), ("served", marked("yes", True))], out)
    with pytest.raises(typer.Exit) as ended:
        report("Claims", [("failed", marked(3, False)), ("served", marked("yes", True))], out)
    assert ended.value.exit_code == 1
    assert json.loads(out.read_text("utf-8"))["rows"] == {"failed": "3 ← wrong", "served": "yes"}
    assert [figure.met for figure in judge(out, [OWN_VERDICT])] == [False, True]


def test_means_cover_the_interval_and_all_histogram_labels() -> None:
    names = {"fuse": "mta_engine_fuse_seconds", "load": "mta_engine_load_seconds"}
    registry = CollectorRegistry()
    fuse = Histogram(names["fuse"], "Fusing.", ["kind"], registry=registry)
    Histogram("mta_engine_fuse_seconds_ahead", "Another, of a longer name.", registry=registry).observe(8)
    fuse.labels("plain").observe(0.25)
    fuse.labels("stacked").observe(0.5)
    before = totals(generate_latest(registry).decode(), names)
    assert before == {"fuse": Total(2, 0.75), "load": Total()}
    assert means_ms(before, before) == {}
    fuse.labels("plain").observe(0.001)
    fuse.labels("stacked").observe(0.003)
    assert means_ms(before, totals(generate_latest(registry).decode(), names)) == pytest.approx({"fuse": 2.0})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with figures of `cost` and of `cold`."""
    spread = Spread.of([1.0, 2.0, 3.0])
    line = ["first | token", spread, spread, spread, None, None, 0.5, 0.6, 1.7]
    title = "model, shared, rank 8 in slots of 8, 16 slots, bfloat16"
    tabulate([Figures(title, COLUMNS, [line])], tmp_path / "cost.json", bench="cost", note="A note.")
    report("Cold", [("in the engine: fuse", spread), ("a limit", 3)], tmp_path / "cold.json", bench="cold")
    (tmp_path / "other.json").write_text('{"rows": {}}')
    return tmp_path


def test_block_gets_its_table_and_the_rest_of_the_page_stays(results: Path) -> None:
    found = read_results(results)
    assert set(found) == {"cost", "cold"}  # `other.json` is another program's
    filled = fill(PAGE, found)
    assert (filled.names, filled.missing) == (("cost",), ("scale",))
    before, _, rest = filled.text.partition("<!-- figures: cost -->\n")
    block, _, after = rest.partition("<!-- end of figures -->")
    rows = [line for line in block.splitlines() if line.startswith("|")]
    assert rows[0] == "| ms | base | recipe | recipe over base | limit, base | limit, recipe | recipe over its limit |"
    assert rows[2].startswith("| first / token | 2.00 (1.00 to 3.00) |")
    assert "A note." in block and " cores of " in block and "stale" not in block
    assert PAGE.startswith(before) and PAGE.endswith(after)
    assert fill(filled.text, found).text == filled.text


def test_the_command_fills_a_page_in_place(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, "utf-8")
    main(results=results, page=page)
    assert page.read_text("utf-8") == fill(PAGE, read_results(results), {"cost": "pictures/performance_cost.png"}).text
    assert "![cost](pictures/performance_cost.png)" in page.read_text("utf-8")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert drawn.keys() == {"performance_cold.png", "performance_cost.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert "not there" in capsys.readouterr().out


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MtaError, match="no results at"):
        read_results(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(MtaError, match=r"broken\.json is not JSON"):
        read_results(tmp_path)
