"""Studies behind docs/quality.md, privacy.md and operations.md: `python -m evaluation.studies.NAME` runs one."""

from __future__ import annotations

import shlex
import subprocess
import sys

import typer

from bench.page.report import console


def mta(*arguments: object) -> None:
    """Print an `mta` command and run it."""
    argv = [str(argument) for argument in arguments]
    console().print(f"mta {shlex.join(argv)}", style="dim", soft_wrap=True)
    command = [sys.executable, "-m", "server.cli", *argv]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise typer.Exit(status)
