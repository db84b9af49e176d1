"""`mta demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.settings import load_settings


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Data folder of the demo's server.", show_default="demo/data in MTA_CACHE_DIR")
    ] = None,
) -> None:
    """From nothing to personalised answers, in a table: a small bank of made-up people, a server, few-shot training.

    In a terminal the server then stays up, with calls to try, until Ctrl-C; elsewhere everything is stopped. Of the
    settings, only MTA_CACHE_DIR and MTA_DTYPE are used.
    """
    from server.cli.demo.steps import show

    raise typer.Exit(show(data or load_settings().cache_dir / "demo" / "data"))
