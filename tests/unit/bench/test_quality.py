"""`python -m bench.quality`: the commands that it stands for, and what it makes of their records."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bank.evaluation.methods import parse_methods
from bank.evaluation.run import Record
from bench.quality import __main__ as quality
from bench.quality.ratings import judged


def test_mails_are_written_at_length_by_known_methods_and_the_last_word_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def note(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(argv)
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", note)
    quality.main(data=tmp_path, task="mail", out=tmp_path, seeds=1, evaluate="--write merged")
    build, evaluation = (argv[3:] for argv in ran)
    assert build[:2] == ["bank", "build"]
    assert evaluation[0] == "eval"
    written = [evaluation[place + 1] for place, word in enumerate(evaluation) if word == "--write"]
    assert written[-1] == "merged"
    assert set(parse_methods(written[0])) <= set(parse_methods(evaluation[evaluation.index("--methods") + 1]))


def test_a_habit_moves_each_score_by_how_much_likelier_it_makes_it_than_everybodys() -> None:
    def record(method: str, *chances: float) -> Record:
        return Record("u", "q", method, 0, 0.0, None, "5", chances=chances)

    habit, model = (0.1, 0.1, 0.1, 0.1, 0.6), (0.1, 0.0, 0.1, 0.0, 0.2)  # of 0.4 for scores at all
    everybody = dict(zip("12345", (0.2, 0.2, 0.1, 0.2, 0.3), strict=True))
    errors, losses = judged([record("prior", *habit), record("common", *model)], everybody)
    assert errors["prior"]["u"] == [pytest.approx(1.0)]
    assert errors["common"]["u"] == [pytest.approx(5 - (1 + 3 + 2 * 5) / 4)]
    assert losses["common"]["u"] == [pytest.approx(-math.log(0.5) / 2)]
    assert losses["common+prior"]["u"] == [pytest.approx(-math.log(1.0 / (0.125 + 0.25 + 1.0)) / 2)]
    assert set(losses) == {"prior", "common", "common+prior"}
