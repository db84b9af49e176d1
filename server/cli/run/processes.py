"""`mta engine`, `mta router` and `mta worker`: the processes beside gateways, each in the foreground."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from bank.models.imports import heavy_imports
from server.cli.process import end_on_signals, prepare_to_train
from server.settings import load_settings
from server.watching.logs import log_to_stderr

Bank = Annotated[Path | None, typer.Option(help="Folder of the bank.", show_default="MTA_BANK")]
Model = Annotated[str | None, typer.Option(help="Base model: folder, hub id or `default`.", show_default="MTA_MODEL")]
Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="MTA_INNER_HOST")]


def engine(
    bank: Bank = None,
    model: Model = None,
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="MTA_ENGINE_PORT")] = None,
) -> None:
    """Start the engine: check the bank and the model, then become the vLLM process.

    All other options are settings (`mta settings`); the key comes from MTA_ENGINE_KEY.
    """
    from server.engine.command import check_engine, engine_command

    settings = load_settings(bank=bank, model=model, inner_host=host, engine_port=port)
    log_to_stderr(settings.log_format)
    argv, environment = engine_command(settings, *check_engine(settings))
    os.execve(argv[0], argv, environment)


def router(
    engine_urls: Annotated[
        str | None, typer.Option(help="Every engine's URL, comma-separated.", show_default="MTA_ENGINE_URLS")
    ] = None,
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="MTA_ROUTER_PORT")] = None,
) -> None:
    """Start the router: become the vllm-router process, which sends the same recipe to the same engine.

    It holds no key: the gateway's passes through it. Never open its port to the outside.
    """
    from server.supervisor.router import router_command

    argv, environment = router_command(load_settings(engine_urls=engine_urls, inner_host=host, router_port=port))
    os.execve(argv[0], argv, environment)


def worker(
    bank: Bank = None,
    model: Model = None,
    redis_url: Annotated[str | None, typer.Option(help="URL of Redis or Valkey.", show_default="MTA_REDIS_URL")] = None,
    threads: Annotated[
        int | None, typer.Option(help="How many threads train.", show_default="MTA_WORKER_THREADS")
    ] = None,
) -> None:
    """Train user adapters, one job at a time, until stopped. Run as many as you like."""
    end_on_signals()
    settings = load_settings(bank=bank, model=model, redis_url=redis_url, worker_threads=threads)
    prepare_to_train(settings.worker_threads, gpu=settings.worker_gpu_share != 0)
    log_to_stderr(settings.log_format)

    with heavy_imports():
        from server.worker.process import run_worker  # torch reads its threads when it is loaded

    asyncio.run(run_worker(settings))
