"""`python -m bench.quality`: the commands that it stands for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bank.evaluation.methods import parse_methods
from bench.quality import __main__ as quality


def test_mails_are_written_at_length_by_known_methods_and_the_last_word_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def note(argv: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
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
