"""Options and process setup that commands share."""

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
    """Set the number of torch threads (default: all cores), how they wait, and whether torch sees a GPU.

    Call this before torch is imported. Threads spin briefly at each barrier and then sleep: endless spinning, the
    default, makes training many times slower on a busy machine, and no spinning halves the speed on an idle one.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process at once until its event loop takes over; nothing needs closing before.

    The default action does not work for process 1 of a container: the kernel ignores it. An exception does not work
    either: the interpreter can swallow it in a callback.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
