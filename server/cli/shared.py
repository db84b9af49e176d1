"""What commands share: options, and what a process sets up before anything heavy is imported."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

Bank = Annotated[Path | None, typer.Option(help="Folder of the bank.", show_default="MTA_BANK")]
Model = Annotated[str | None, typer.Option(help="Base model: folder, hub id or `default`.", show_default="MTA_MODEL")]
Embedder = Annotated[Path | None, typer.Option(help="Folder of the embedder.", show_default="MTA_EMBEDDER")]
RedisUrl = Annotated[str | None, typer.Option(help="URL of Redis or Valkey.", show_default="MTA_REDIS_URL")]


def prepare_to_train(threads: int | None = None, *, gpu: bool = True) -> None:
    """Set how many threads torch has (all cores by default), how they wait, and whether it may see a GPU.

    Torch reads it when it is loaded. Threads spin for a moment at each barrier, then sleep: spinning on, the default,
    makes training many times slower when anything else runs beside it, and never spinning halves its speed on an idle
    machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def end_on_signals() -> None:
    """Have SIGINT and SIGTERM end a process in which there is nothing to close yet, until its event loop takes over.

    The default action would not do: the kernel spares process 1, which this is in a container. Nor would an exception,
    which a callback of the interpreter may swallow.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
