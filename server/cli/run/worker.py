"""`mta worker`: the process that trains user adapters, in the foreground."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from bank.models.imports import heavy_imports
from server.cli.process import end_on_signals, prepare_to_train
from server.watching.logs import log_to_stderr


def worker(
    bank: Annotated[Path | None, typer.Option(help="Folder of the bank.", show_default="MTA_BANK")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: folder, hub id or `default`.", show_default="MTA_MODEL")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="URL of Redis or Valkey.", show_default="MTA_REDIS_URL")] = None,
    threads: Annotated[
        int | None, typer.Option(help="How many threads train.", show_default="MTA_WORKER_THREADS")
    ] = None,
) -> None:
    """Train user adapters, one job at a time, until stopped. Run as many as you like."""
    from server.settings import load_settings

    end_on_signals()
    settings = load_settings(bank=bank, model=model, redis_url=redis_url, worker_threads=threads)
    prepare_to_train(settings.worker_threads, gpu=settings.worker_gpu_share != 0)
    log_to_stderr(settings.log_format)

    with heavy_imports():
        from server.worker.process import run_worker  # torch reads its threads when it is loaded

    asyncio.run(run_worker(settings))
