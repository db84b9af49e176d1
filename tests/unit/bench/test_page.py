"""A page's blocks are filled with the tables of JSON files, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import MtaError
from bench.page.__main__ import main, read_results
from bench.page.markdown import fill
from bench.page.report import Figures, Spread, report, tabulate
from bench.serving.cost import COLUMNS

PAGE = """# Performance

Before.

<!-- figures: cost -->
stale | table
<!-- end of figures -->

Between.

<!-- figures: scale 2 -->
not measured yet
<!-- end of figures -->
"""


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


def test_a_block_gets_its_table_without_empty_columns_and_the_rest_of_the_page_stays(results: Path) -> None:
    found = read_results(results)
    assert set(found) == {"cost", "cold"}  # `other.json` is another program's
    filled = fill(PAGE, found)
    assert (filled.names, filled.missing) == (("cost",), ("scale",))
    before, _, rest = filled.text.partition("<!-- figures: cost -->\n")
    block, _, after = rest.partition("<!-- end of figures -->")
    rows = [line for line in block.splitlines() if line.startswith("|")]
    assert rows[0] == "| ms | base | recipe | recipe over base | limit, base | limit, recipe | recipe over its limit |"
    assert rows[2].startswith("| first / token | 2.00 (1.00 to 3.00) |")
    assert "stale" not in block
    assert "A note." in block
    assert PAGE.startswith(before) and PAGE.endswith(after)
    assert fill(filled.text, found).text == filled.text


def test_the_nth_table_of_a_file_can_stand_alone() -> None:
    tables = [{"title": f"table {n}", "columns": ["a"], "lines": [[n]]} for n in (1, 2, 3)]
    machine = {"processor": "P", "cores": 2, "amx": False}
    content: dict[str, Any] = {"bench": "scale", "command": "mta bench scale", "machine": machine, "tables": tables}
    text = fill(PAGE, {"scale": content}).text
    assert "**table 2**" in text
    assert "**table 1**" not in text
    assert "`mta bench scale`, 2 cores of P without AMX." in text


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
