"""Benchmarks, each a command: `mta bench NAME`, or `python -m bench.…` for those that acceptance runs. They need the
extra `client` besides `cpu` or `gpu`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from adapters.errors import MtaError


def script(main: Callable[..., object]) -> None:
    """Run a benchmark as a program: known errors become one line on stderr and exit status 1."""
    try:
        typer.run(main)
    except MtaError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
