"""The quality benchmark's machinery from people to table, as a person starts it, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bank.evaluation.pictures import CURVES_FILE, GAINS_FILE, PRICES_FILE
from bank.evaluation.session import SUMMARY_FILE, TABLE_FILE
from bank.evaluation.summary import LAMP_FOLDER

METHODS = {
    *("base", "common", "task", "mean", "random", "merged", "stacked", "own", "merged:topic", "merged+history@h1"),
}
WRITTEN = {"common", "merged+history@h1"}
PNG = b"\x89PNG"


def _methods(table: str) -> set[str]:
    """The first column of a Markdown table."""
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| ") for row in rows[2:]}


def test_quick_builds_a_bank_and_evaluates_every_method(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.quality", "--quick", "--seeds", "1", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    out = tmp_path / "quick"
    table = (out / TABLE_FILE).read_text("utf-8")
    losses, _, authors = table.partition("**Authorship**")
    everyone, _, sample = losses.partition("**2 of them**")
    assert everyone.startswith("**3 people**")
    assert _methods(everyone) == METHODS - {"stacked", "own"}
    assert _methods(sample) == METHODS
    summary = json.loads((out / SUMMARY_FILE).read_text("utf-8"))
    assert (summary["people"], summary["seeds"]) == (3, 1)
    assert {row["method"] for row in summary["authorship"]} == WRITTEN | {"gold"}
    assert _methods(authors) >= WRITTEN
    points = {row["method"] for row in summary["methods"]} - METHODS
    assert {"merged@k1", "merged@k3", "merged@n1", "merged@n5"} <= points
    assert all((out / name).read_bytes().startswith(PNG) for name in (GAINS_FILE, CURVES_FILE, PRICES_FILE))
    golds = json.loads((out / LAMP_FOLDER / "golds.json").read_text("utf-8"))["golds"]
    answered = json.loads((out / LAMP_FOLDER / "merged.json").read_text("utf-8"))["golds"]
    assert [gold["id"] for gold in golds] == [answer["id"] for answer in answered]
    assert len(golds) == 2 * 3  # texts are written for the sample alone
    assert golds[0]["output"] == "30 indeed"
