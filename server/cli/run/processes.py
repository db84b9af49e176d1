"""`mta engine`, `mta router` and `mta worker`: one process each, in the foreground."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer

from bank.models.process_startup import heavy_imports
from server.cli.shared import Bank, Model, RedisUrl, end_on_signals, prepare_to_train
from server.settings import load_settings
from server.watching.logs import log_to_stderr

Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.", show_default="MTA_INNER_HOST")]


def engine(
    bank: Bank = None,
    model: Model = None,
    inner_host: Host = None,
    engine_port: Annotated[
        int | None, typer.Option("--port", help="Port to listen on.", show_default="MTA_ENGINE_PORT")
    ] = None,
) -> None:
    """Start the engine: check the bank and the model, then become the vLLM process.

    All other options are settings (`mta settings`); the key comes from MTA_ENGINE_KEY.
    """
    settings = load_settings(**locals())
    from server.engine.command import check_engine, engine_command

    log_to_stderr(settings.log_format)
    argv, environment = engine_command(settings, *check_engine(settings))
    os.execve(argv[0], argv, environment)


def router(
    engine_urls: Annotated[
        str | None, typer.Option(help="Every engine's URL, comma-separated.", show_default="MTA_ENGINE_URLS")
    ] = None,
    inner_host: Host = None,
    router_port: Annotated[
        int | None, typer.Option("--port", help="Port to listen on.", show_default="MTA_ROUTER_PORT")
    ] = None,
) -> None:
    """Start the router: become the vllm-router process, which sends the same recipe to the same engine.

    The router has no key of its own; it passes the gateway's key on. Never expose its port to the outside.
    """
    settings = load_settings(**locals())
    from server.supervisor.services import router_command

    argv, environment = router_command(settings)
    os.execve(argv[0], argv, environment)


def worker(
    bank: Bank = None,
    model: Model = None,
    redis_url: RedisUrl = None,
    worker_threads: Annotated[
        int | None, typer.Option("--threads", help="Number of training threads.", show_default="MTA_WORKER_THREADS")
    ] = None,
) -> None:
    """Train user adapters, one job at a time, until stopped. You can run any number of workers."""
    settings = load_settings(**locals())
    end_on_signals()
    prepare_to_train(settings.worker_threads, gpu=settings.worker_gpu_share != 0)
    log_to_stderr(settings.log_format)

    with heavy_imports():
        from server.worker.process import run_worker  # torch reads the number of threads on import

    asyncio.run(run_worker(settings))
