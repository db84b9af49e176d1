"""Benchmarks. Each is a command: `mta bench NAME`, or `python -m bench.…` for those that only acceptance runs. They
need the extra `cpu` or `gpu`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from adapters.errors import MtaError
from server.observability.background import exit_on_signals


def script(main: Callable[..., object]) -> None:
    """Run a benchmark as a program: known errors become one line on stderr and exit status 1."""
    exit_on_signals()
    try:
        typer.run(main)
    except MtaError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
