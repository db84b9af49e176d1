"""The `mta` command itself: its version, and signals and ends that are the same for all of its commands."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app

SWALLOWED = """
import signal, sys, time
from server import cli
from bench import exit_on_sigterm

class Dying:
    def __del__(self):
        signal.raise_signal(NUMBER)  # what is raised here reaches nobody

@cli.app.command("wait")
def wait():
    exit_on_sigterm()
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


def test_it_says_its_version() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    said = CliRunner().invoke(app, ["--version"])
    assert (said.exit_code, said.output) == (0, f"mta {project['version']}\n")


@pytest.mark.parametrize(("number", "status"), [("SIGINT", (1, 130)), ("SIGTERM", (143,))])
def test_a_signal_while_exceptions_reach_nobody_ends_a_command(number: str, status: tuple[int, ...]) -> None:
    script = SWALLOWED.replace("NUMBER", f"signal.{number}")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ("it went on" in ran.stdout, ran.returncode in status) == (False, True)


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
def test_a_process_full_of_heavy_imports_ends_with_its_status_and_lists_no_leaks(
    end: str, status: int, said: str
) -> None:
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-c", FROZEN.replace("END", end)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (status, "all is done\n")
    assert ran.stderr.endswith(said)
    assert "leak" not in ran.stderr
