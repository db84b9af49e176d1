"""Benchmarks. Each is a command: `mta bench NAME`, or `python -m bench.…` for those that only acceptance runs. They
need the extra `cpu` or `gpu`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import typer

from adapters.errors import MtaError


def exit_on_sigterm() -> None:
    """Let SIGTERM exit this process like Ctrl-C, so that it stops the servers it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def script(main: Callable[..., object]) -> None:
    """Run a benchmark as a program: known errors become one line on stderr and exit status 1."""
    exit_on_sigterm()
    try:
        typer.run(main)
    except MtaError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
