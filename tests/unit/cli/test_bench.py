"""`mta bench`: each benchmark has its own help, and says what it lacks."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from adapters.errors import MtaError
from server.cli import app

OPTIONS = {
    "cost": "--without-lora",
    "cold": "--pairs",
    "thrash": "--users",
    "stall": "--arrivals",
    "adapt": "--samples",
    "scale": "--quick",
    "report": "--page",
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize(("name", "option"), OPTIONS.items())
def test_each_benchmark_shows_its_own_options(name: str, option: str) -> None:
    result = CliRunner().invoke(app, ["bench", name, "--help"])
    assert result.exit_code == 0
    assert f"mta bench {name} [OPTIONS]" in result.output
    assert option in result.output


def test_all_of_them_are_listed() -> None:
    listed = CliRunner().invoke(app, ["bench", "--help"]).output
    assert all(name in listed for name in OPTIONS)


@pytest.mark.parametrize("name", ["cost", "cold", "thrash", "stall", "adapt"])
def test_a_bank_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_BANK", raising=False)
    result = CliRunner().invoke(app, ["bench", name])
    assert isinstance(result.exception, MtaError)
    assert "MTA_BANK" in str(result.exception)


def test_an_unknown_option_is_refused() -> None:
    assert CliRunner().invoke(app, ["bench", "thrash", "--nonsense"]).exit_code == 2
