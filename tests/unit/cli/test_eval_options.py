"""What `mta eval` refuses before it opens a model."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from bank.manifest import write_manifest
from server.cli import app
from tests.unit.bank.test_weights import manifest


def test_texts_are_asked_for_where_answers_have_a_voice(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest().model_copy(update={"task": "movie_rating"}))
    command = ["eval", "--users", "users.json", "--bank", str(tmp_path), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*command, "--methods", "base", "--write", "base"])
    assert refused.exit_code == 2
    assert "this bank's answers are score" in " ".join(refused.output.replace("│", " ").split())
