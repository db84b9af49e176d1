"""Options and process setup that commands share."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from server.settings import Settings

MOST_DAYS = 36_500  # far beyond, times have no date any more


def setting(name: str, *flags: str, about: str | None = None, **more: Any) -> Any:
    """Return the option of a setting; if it is not given, the setting's variable or default applies."""
    about = about or Settings.model_fields[name].description
    return typer.Option(*flags, help=about, show_default=f"MTA_{name.upper()}", **more)


Bank = Annotated[Path | None, setting("bank")]
Model = Annotated[str | None, setting("model")]
Embedder = Annotated[Path | None, setting("embedder")]
Data = Annotated[Path | None, setting("data_dir", about="Data folder of `mta up`.")]
RedisUrl = Annotated[str | None, setting("redis_url", about="URL of Redis or Valkey.")]


def table_console() -> Console:
    """Return a console for tables, which are not cut where there is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


def prepare_to_train(threads: int | None = None, *, gpu: bool = True) -> None:
    """Set the number of torch threads, and whether torch sees a GPU; call this before torch is imported."""
    # Threads spin briefly at each barrier and then sleep: endless spinning, the default, makes training many times
    # slower on a busy machine, and no spinning halves the speed on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process at once until its event loop takes over; nothing needs closing before."""
    # The kernel keeps the default action from process 1 of a container, and the interpreter can swallow an exception.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
