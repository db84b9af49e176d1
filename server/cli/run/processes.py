"""`mta models`, `mta engine`, `mta router` and `mta worker`: one process each, in the foreground."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bank.models.process_startup import heavy_imports
from server.cli.shared import Bank, Embedder, Model, RedisUrl, end_on_signals, prepare_to_train, setting
from server.settings import load_settings
from server.watching.logs import log_to_stderr

Host = Annotated[str | None, setting("inner_host", "--host")]


def models(
    bank: Bank = None,
    model: Model = None,
    embedder: Embedder = None,
    cache_dir: Annotated[Path | None, setting("cache_dir")] = None,
    *,
    needs: Annotated[
        bool, typer.Option("--needs", help="Only print what the base model needs; no weights are fetched.")
    ] = False,
) -> None:
    """Prepare the base model, the embedder and, with vLLM for CPUs, the CPU kernel, and print their paths.

    Other commands do so on first use, if the folder is writable. A hub id is fetched at the bank's revision, if any.
    """
    settings = load_settings(bank=bank, model=model, embedder=embedder, cache_dir=cache_dir)
    if needs:
        from server.cli.run.needs import needs_table

        for what, size in needs_table(settings):
            typer.echo(f"{what:<44}{size:>16}")
        return
    from bank.manifest import MANIFEST_FILE, read_manifest
    from bank.models.folders import ensure_base_model, ensure_embedder
    from server.engine.command import is_cpu_build
    from server.engine.cpu import native

    cache, folder = settings.cache_dir, settings.bank
    built_for = read_manifest(folder).base_model if folder and (folder / MANIFEST_FILE).exists() else None
    preparations: dict[str, Callable[[], Path | None]] = {
        "base model": lambda: ensure_base_model(settings.model, cache, built_for),
        "embedder": lambda: ensure_embedder(settings.embedder, cache),
    }
    if is_cpu_build():
        preparations["CPU kernel"] = lambda: native.library_path(cache) if native.build(cache) else None
    for what, prepare in preparations.items():
        typer.echo(f"preparing the {what} …", err=True)  # stdout has only the paths
        if path := prepare():
            typer.echo(f"{what:<12}{path}")


def engine(
    bank: Bank = None,
    model: Model = None,
    inner_host: Host = None,
    engine_port: Annotated[int | None, setting("engine_port", "--port")] = None,
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
    engine_urls: Annotated[str | None, setting("engine_urls")] = None,
    inner_host: Host = None,
    router_port: Annotated[int | None, setting("router_port", "--port")] = None,
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
    worker_threads: Annotated[int | None, setting("worker_threads", "--threads")] = None,
) -> None:
    """Train user adapters, one job at a time, until stopped. You can run any number of workers."""
    settings = load_settings(**locals())
    end_on_signals()
    prepare_to_train(settings.worker_threads, gpu=settings.worker_gpu_share != 0)
    log_to_stderr(settings.log_format)

    with heavy_imports():
        from server.worker.process import run_worker  # torch reads the number of threads on import

    asyncio.run(run_worker(settings))
