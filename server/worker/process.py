"""The worker process: build the parts and run the loops until a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.models.folders import check_base_model, ensure_base_model, ensure_embedder
from bank.models.load import limit_gpu, resolve_dtype
from bank.models.process_startup import heavy_imports
from server.errors import ApiError
from server.observability import open_tracing
from server.settings import Settings
from server.store.opening import open_stores
from server.worker.lease import on_model_thread
from server.worker.loops import JobLoop, SigningLoop, WorkerMetrics
from server.worker.training import AdapterTrainer

log = logging.getLogger("mta.worker")

QUEUE_WAIT_S = 5.0  # longest wait for a job or user per call
STORE_RETRY_S = 1.0  # pause after a failed store call


async def run_worker(settings: Settings) -> None:
    """Train jobs and, if the bank has signatures, sign users, until a signal; MtaError if a part cannot be opened."""
    limit_gpu(settings.worker_gpu_share)
    with heavy_imports():
        bank, trainer = await on_model_thread(_open_parts, settings)
    metrics, tracing = WorkerMetrics(), open_tracing(settings, "mta-worker")
    metrics.publish(settings)
    async with open_stores(settings, timed=metrics.store, span=tracing.span) as stores:
        profiles, model_lock = stores.profiles, asyncio.Lock()
        kept = stores.jobs, profiles, stores.feedback, stores.adapters
        jobs = JobLoop(*kept, bank, trainer, model_lock, metrics, tracing, settings.adapter_versions)
        loops = [work_forever(jobs.work_once)]
        if bank.manifest.has_signatures:
            signing = stores.signing(bank.manifest.short)
            jobs.signing = SigningLoop(signing, profiles, bank, trainer, model_lock, metrics)
            loops.append(work_forever(jobs.signing.work_once))
        working = asyncio.gather(*loops)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, working.cancel)
        log.info("ready: bank %s, %s", bank.manifest.short, bank.manifest.base_model.name)
        try:
            with suppress(asyncio.CancelledError):
                await working
        except Exception:
            # Exit at once: a normal exit waits for threads, which may hang, and starts one, which may fail.
            try:
                log.critical("the worker exits", exc_info=True)
                logging.shutdown()
            finally:
                os._exit(1)
    await asyncio.to_thread(tracing.close)


def _open_parts(settings: Settings) -> tuple[ServingBank, AdapterTrainer]:
    folder = settings.bank_folder()
    embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    bank = ServingBank.open(folder, embedder.id)
    model = ensure_base_model(settings.model, settings.cache_dir, bank.manifest.base_model, settings.chat_template)
    check_base_model(model, {folder: bank.manifest})
    trainer = AdapterTrainer.open(folder, bank.manifest, model, resolve_dtype("auto"), settings.sample_tokens)
    trainer.warm_up()
    return bank, trainer


async def work_forever(work_once: Callable[[float], Awaitable[object]]) -> None:
    """Work until cancelled; wait while the store is unreachable. Raises unexpected errors: a new process is safer."""
    while True:
        try:
            await work_once(QUEUE_WAIT_S)
        except ApiError as error:
            log.warning("%s", error.explained)
            await asyncio.sleep(STORE_RETRY_S)
