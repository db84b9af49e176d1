"""Quality of personal answers: `python -m bench.quality`, `bench.quality.engine` and `bench.quality.ratings`.

All three run `mta eval`; the last two compare its records.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import typer

from bank.evaluation.methods import default_methods
from bank.items.tasks import get_task
from bench.page.report import console


def methods_of(task: str) -> str:
    """Return the comma-separated methods that docs/quality.md reports for a task."""
    return ",".join([*(method.name for method in default_methods(get_task(task).kind)), "merged:topic"])


def mta(*arguments: object, **environment: str) -> None:
    """Print an `mta` command and run it."""
    argv: Sequence[str] = [str(argument) for argument in arguments]
    console().print(f"mta {shlex.join(argv)}", style="dim", soft_wrap=True)
    command = [sys.executable, "-m", "server.cli", *argv]
    status = subprocess.run(command, env=os.environ | environment, check=False).returncode
    if status:
        raise typer.Exit(status)
