"""`mta worker`: the process that trains user adapters, in the foreground."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.process import log_to_stderr, prepare_to_train

if TYPE_CHECKING:
    from server.settings import Settings


def worker(
    bank: Annotated[Path | None, typer.Option(help="Folder of the bank; MTA_BANK.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: folder, hub id or `default`; MTA_MODEL.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis or Valkey; MTA_REDIS_URL.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that train; MTA_WORKER_THREADS.")] = None,
) -> None:
    """Train user adapters, one job at a time, until stopped. Run as many as you like."""
    from server.settings import load_settings

    settings = load_settings(bank=bank, model=model, redis_url=redis_url, worker_threads=threads)
    prepare_to_train(settings.worker_threads)
    log_to_stderr()
    asyncio.run(_run(settings))


async def _run(settings: Settings) -> None:
    """Open the parts, then work until a signal."""
    from bank.lookup.embedder import Embedder
    from bank.lookup.serving import ServingBank
    from bank.models.folders import check_base_model, ensure_base_model, ensure_embedder
    from bank.models.load import resolve_dtype
    from server.store.redis.connection import RedisConnection
    from server.store.redis.jobs import RedisJobs
    from server.store.redis.profiles import RedisProfiles
    from server.store.redis.signing import RedisSigning
    from server.worker.job_loop import Worker
    from server.worker.signing_loop import SigningLoop
    from server.worker.training import AdapterTrainer

    bank_folder = settings.bank_folder()
    embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    bank = ServingBank.open(bank_folder, embedder.id)
    folder = ensure_base_model(settings.model, settings.cache_dir)
    check_base_model(folder, {bank_folder: bank.manifest})
    trainer = AdapterTrainer.open(bank_folder, bank.manifest, folder, resolve_dtype("auto"))
    model = asyncio.Lock()
    connection = RedisConnection(settings.redis_url, require_durable=settings.require_durable_store)
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        await connection.check()
        profiles = RedisProfiles(connection)
        loops = [Worker(name, RedisJobs(connection), profiles, bank, trainer, model=model).run()]
        if bank.signs:
            loops.append(
                SigningLoop(
                    name, RedisSigning(connection, bank.manifest.short), profiles, bank, trainer, model=model
                ).run()
            )
        working = asyncio.gather(*loops)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, working.cancel)
        logging.getLogger("mta.worker").info("ready: bank %s, %s", bank.manifest.short, bank.manifest.base_model.name)
        with suppress(asyncio.CancelledError):
            await _until_it_fails(working)
    finally:
        await connection.close()


async def _until_it_fails(working: asyncio.Future[Any]) -> None:
    """Wait for what goes on for ever; an error ends the process here and now.

    Any other way out waits for a thread that may hang, and starts one, which without memory may never begin.
    """
    try:
        await working
    except Exception:
        try:
            logging.getLogger("mta.worker").critical("the worker ends", exc_info=True)
            logging.shutdown()
        finally:
            os._exit(1)
