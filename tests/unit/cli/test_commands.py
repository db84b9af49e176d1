"""The `mta` command: options, what is refused before a model opens, progress of builds, how every command ends."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from adapters.errors import MtaError
from adapters.training.trainer import StepReport
from bank.building.options import BuildOptions, ImportOptions
from bank.errors import BankError
from bank.manifest import PosteriorRule, WeightRule, write_manifest
from server.cli import app
from server.cli.bank import commands
from server.cli.bench import BENCHMARKS
from server.cli.progress import ConsoleProgress
from tests.unit.bank.test_weights import manifest

BENCH_OPTIONS = {
    "cost": "--without-lora",
    "cold": "--pairs",
    "thrash": "--users",
    "stall": "--arrivals",
    "adapt": "--samples",
    "scale": "--quick",
    "report": "--page",
}
SWALLOWED = """
import signal, sys, time
from server import cli
from server.observability.background import exit_on_signals

class Dying:
    def __del__(self):
        signal.raise_signal(NUMBER)  # what is raised here reaches nobody

@cli.app.command("wait")
def wait():
    exit_on_signals()
    Dying()
    for _ in range(600):
        time.sleep(0.1)
    print("it went on")

sys.argv = ["mta", "wait"]
cli.main()
"""
FROZEN = """
import sys
from adapters.errors import MtaError
from bank.models.process_startup import heavy_imports, run_and_exit

with heavy_imports():
    import triton.runtime

def main():
    print("all is done")
    END

run_and_exit(main)
"""


def mta(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})


def ran(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_it_says_its_version() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    said = mta("--version")
    assert (said.exit_code, said.output) == (0, f"mta {project['version']}\n")


@pytest.mark.parametrize(("kind", "command"), [(BuildOptions, commands.build), (ImportOptions, commands.import_)])
def test_command_has_every_option_with_its_own_default(kind: type, command: Callable[..., None]) -> None:
    defaults, parameters = kind("chat"), inspect.signature(command).parameters
    given = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(kind)}
    assert given.keys() <= parameters.keys()
    for name, value in given.items():
        assert parameters[name].default in (value, inspect.Parameter.empty)
    assert commands._options(kind, given | {"k": 3, "out": "bank"}) == kind("chat", k=3)


@pytest.mark.parametrize(
    ("given", "names"), [("q_proj, v_proj", ("q_proj", "v_proj")), (("q_proj",), ("q_proj",)), ("", None)]
)
def test_names_are_one_text_with_commas(given: Any, names: tuple[str, ...] | None) -> None:
    assert BuildOptions("chat", target_modules=given).target_modules == names


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (BuildOptions, {"batch_size": -1}, "--batch-size: .* greater than or equal to 1, got -1"),
        (BuildOptions, {"learning_rate": math.nan}, "--learning-rate: .* got nan"),
        (BuildOptions, {"learning_rate": 1.0}, "--learning-rate: .* less than 1, got 1.0"),
        (BuildOptions, {"history_share": 1.1}, "--history-share: .* less than or equal to 1, got 1.1"),
        (BuildOptions, {"dtype": "int8"}, "--dtype: .*'auto', 'bfloat16' or 'float32', got 'int8'"),
        (BuildOptions, {"anchors_by": "luck"}, "--anchors-by: .* got 'luck'"),
        (ImportOptions, {"k": 0}, "--k: .* greater than or equal to 1, got 0"),
    ],
)
def test_a_value_beyond_its_limit_is_refused_by_the_options_name(kind: type, given: dict[str, Any], says: str) -> None:
    with pytest.raises(BankError, match=f"^{says}$"):
        kind(**{"task": "chat"} | given)


def test_the_rule_of_weights_is_told_in_a_line() -> None:
    topic = "topic, at most 2 anchors, strength 0.5"
    posterior = f"posterior, decay 250; until there is a signature, {topic}"
    for rule, words in ((None, topic), (PosteriorRule(), posterior)):
        weights = WeightRule(anchors=2, strength=0.5, posterior=rule)
        assert commands._describe_rule(weights.model_dump(mode="json")) == words


def test_texts_are_asked_for_where_answers_have_a_voice(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest().model_copy(update={"task": "movie_rating"}))
    paths = ("--users", "users.json", "--bank", str(tmp_path), "--out", str(tmp_path / "out"))
    refused = mta("eval", *paths, "--methods", "base", "--write", "base")
    assert refused.exit_code == 2
    assert "this bank's answers are score" in " ".join(refused.output.replace("│", " ").split())


def test_unreachable_store_is_told_with_cause_and_setting(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest())
    failed = mta("readapt", "--bank", str(tmp_path), "--redis-url", "redis://127.0.0.1:1").exception
    assert re.search("connecting to 127.0.0.1:1.* MTA_REDIS_URL is correct", str(failed))


def test_each_benchmark_is_listed_with_its_options_and_a_main() -> None:
    for name, option in BENCH_OPTIONS.items():
        result = mta("bench", name, "--help")
        assert result.exit_code == 0
        assert f"mta bench {name} [OPTIONS]" in result.output
        assert option in result.output, name
    assert BENCHMARKS.keys() >= BENCH_OPTIONS.keys()
    for name, (module, _) in BENCHMARKS.items():
        *group, command = name.split()
        assert command in mta("bench", *group, "--help").output
        spec = find_spec(module)
        assert spec and spec.origin
        assert "\ndef main(" in Path(spec.origin).read_text("utf-8"), module


def test_benchmark_needs_a_bank_and_refuses_unknown_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_BANK", raising=False)
    for name in ("cost", "cold", "thrash", "stall", "adapt"):
        failed = mta("bench", name).exception
        assert isinstance(failed, MtaError)
        assert "MTA_BANK" in str(failed)
    assert mta("bench", "thrash", "--nonsense").exit_code == 2


@pytest.mark.parametrize(("number", "status"), [("SIGINT", (1, 130)), ("SIGTERM", (143,))])
def test_a_signal_while_exceptions_reach_nobody_ends_a_command(number: str, status: tuple[int, ...]) -> None:
    done = ran(SWALLOWED.replace("NUMBER", f"signal.{number}"))
    assert ("it went on" in done.stdout, done.returncode in status) == (False, True)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why not')", 1, "why not\n"),
        ("raise MtaError('no such bank')", 1, "adapters.errors.MtaError: no such bank\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
    ],
)
def test_heavy_process_ends_with_its_status_and_lists_no_leaks(end: str, status: int, said: str) -> None:
    pytest.importorskip("triton")
    done = ran(FROZEN.replace("END", end))
    assert (done.returncode, done.stdout) == (status, "all is done\n")
    assert done.stderr.endswith(said)
    assert "leak" not in done.stderr


class Shown(ConsoleProgress):
    """Progress whose time passes when a test says so."""

    def __init__(self, **console: Any) -> None:
        self.now_s, self.text = 100.0, StringIO()
        super().__init__(Console(file=self.text, width=120, **console), lambda: self.now_s)

    def pieces(self, *done: int, of: int, each_s: float) -> list[str]:
        """Show that these are done, a while after another; all lines so far."""
        for number in done:
            self.now_s += each_s
            self.piece("measuring", number, of)
        return self.text.getvalue().splitlines()


def test_a_path_is_told_as_it_is() -> None:
    with Shown() as progress:
        progress.say("/data/[/old]/[v2].json")
    assert progress.text.getvalue() == "/data/[/old]/[v2].json\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_rows_then_pieces_then_another_row(terminal: bool) -> None:
    with Shown(force_terminal=terminal) as progress:
        progress.begin({"common": 10})
        progress.step("common", 1, StepReport(1, 2.5, 10))
        progress.pieces(1, 2, 3, of=3, each_s=0)
        progress.begin({"task": 10})
        progress.step("task", 1, StepReport(1, 1.5, 10))
    for said in ("training common (1 of 1)", "measuring: 3 of 3", "training task (1 of 1)"):
        assert said in progress.text.getvalue()


@pytest.mark.parametrize("begun", [0, 2])
def test_time_left_uses_the_pace_of_pieces_made_in_this_run(begun: int) -> None:
    with Shown() as progress:  # pieces that an earlier run made took no time in this one
        lines = progress.pieces(*range(begun, begun + 6), of=32, each_s=6)
    left_s = 6 * (32 - begun - 5)
    assert lines[-1] == f"measuring: {begun + 5} of 32  about {left_s // 60}:{left_s % 60:02d} min left"


def test_terminal_bar_begins_empty_and_shows_the_time_left() -> None:
    with Shown(force_terminal=True, color_system=None) as progress:
        progress.piece("measuring", 0, 8)
        assert "measuring: 0 of 8" in progress.text.getvalue()
        assert "━" not in progress.text.getvalue()
        progress.pieces(1, 2, of=8, each_s=30)
    assert re.search("━{10} +measuring: 2 of 8  about 3:00 min left", progress.text.getvalue())  # a quarter of 40


def test_lines_without_a_terminal_are_spaced_and_include_last() -> None:
    with Shown() as progress:
        lines = progress.pieces(*range(13), of=12, each_s=2)
    assert [line.split("  ")[0] for line in lines] == [f"measuring: {done} of 12" for done in (3, 6, 9, 12)]
