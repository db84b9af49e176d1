"""`mta bench`: each benchmark has its own help, and says what it lacks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.errors import MtaError
from server.cli import app
from server.cli.bench import BENCHMARKS

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


def test_all_of_them_are_listed_and_have_a_main() -> None:
    listed = [CliRunner().invoke(app, [*group, "--help"]).output for group in (["bench"], ["bench", "fleet"])]
    assert all(name in listed[0] for name in [*OPTIONS, "overload", "fairness", "fleet"])
    assert all(name in listed[1] for name in ["chaos", "replicas", "simulate", "rolling"])
    for module in BENCHMARKS:
        spec = find_spec(module)
        assert spec and spec.origin
        assert "\ndef main(" in Path(spec.origin).read_text("utf-8"), module


def test_a_bank_is_asked_for_and_an_unknown_option_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_BANK", raising=False)
    for name in ("cost", "cold", "thrash", "stall", "adapt"):
        result = CliRunner().invoke(app, ["bench", name])
        assert isinstance(result.exception, MtaError)
        assert "MTA_BANK" in str(result.exception)
    assert CliRunner().invoke(app, ["bench", "thrash", "--nonsense"]).exit_code == 2
