"""How acceptance judges a benchmark's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.acceptance import FUSE, GATEWAY, ORACLE, SOAK, Figure, Outcome, Target, judge


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def _verdicts(report: Path, rows: dict[str, object], targets: tuple[Target, ...]) -> list[bool]:
    report.write_text(json.dumps({"rows": rows}))
    return [figure.met for figure in judge(report, targets)]


def test_every_row_that_a_target_names_must_meet_it(report: Path) -> None:
    growth = SOAK[3:4]
    assert _verdicts(report, {"growth of A, %": 1.0, "growth of B, %": 2.9, "other": 99}, growth) == [True, True]
    assert _verdicts(report, {"growth of A, %": 1.0, "growth of B, %": 3.1}, growth) == [True, False]


def test_a_figure_that_is_not_there_is_missed(report: Path) -> None:
    assert _verdicts(report, {}, FUSE) == [False]
    report.unlink()
    assert [figure.met for figure in judge(report, ORACLE)] == [False] * len(ORACLE)


@pytest.mark.parametrize(
    ("targets", "label", "good", "bad"),
    [
        (FUSE, "merge over worker", {"median": 5.0, "min": 1, "max": 9}, {"median": 4.9, "min": 1, "max": 9}),
        (ORACLE[:1], "shared, float32: largest", "9.9e-03", "1.1e-02"),
        (SOAK[:1], "answers", "2000 of 2000", "1999 of 2000"),
        (SOAK[1:2], "stream still running at the end", True, False),
        (SOAK[2:3], "of them not this recipe's own choice", 0, 1),
        (SOAK[5:6], "/metrics, lines after 10 and 2000", "5000 and 5000", "5000 and 5001"),
    ],
)
def test_targets_are_those_of_the_product(
    report: Path, targets: tuple[Target, ...], label: str, good: object, bad: object
) -> None:
    assert _verdicts(report, {label: good}, targets) == [True]
    assert _verdicts(report, {label: bad}, targets) == [False]


def test_a_missed_aim_is_shown_but_fails_nothing(report: Path) -> None:
    report.write_text(json.dumps({"rows": {GATEWAY[0].row: {"median": 4.0, "min": 3, "max": 5}}}))
    figures = judge(report, GATEWAY)
    assert [figure.met for figure in figures] == [False]
    assert Outcome("gateway", "", 0.0, 0, figures).passed
    assert not Outcome("fuse", "", 0.0, 0, [Figure("merge", "4", "5", met=False, binding=True)]).passed
    assert not Outcome("soak", "", 0.0, 1, []).passed
