"""Benchmarks. Each is a command: `mta bench NAME`, or `python -m bench.…` for those that only acceptance runs. They
need the extra `cpu` or `gpu`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import typer

from adapters.errors import MtaError


def exit_on_signals() -> None:
    """Let SIGTERM, and SIGHUP unless `nohup` ignores it, exit like Ctrl-C, so that servers that were started stop."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def script(main: Callable[..., object]) -> None:
    """Run a benchmark as a program: known errors become one line on stderr and exit status 1."""
    exit_on_signals()
    try:
        typer.run(main)
    except MtaError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
