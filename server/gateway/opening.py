"""Opens, connects and closes the parts of a gateway."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.errors import MtaError
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.lookup.signature import empty_signature
from bank.models.folders import ensure_embedder
from server.errors import ApiError, Unavailable
from server.gateway.access.keys import REFRESH_INTERVAL_S, USED_INTERVAL_S, KnownKeys
from server.gateway.access.limiter import RENEW_INTERVAL_S, Limiter
from server.gateway.access.queue import COUNT_GATEWAYS_S, EngineQueue, GatewayShare
from server.gateway.access.quotas import COUNT_INTERVAL_S, RECOUNT_CHECK_S, Quotas
from server.gateway.access.shares import FairQueue, Shares
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import EngineClient, open_session
from server.gateway.experiments.tallies import FOLD_INTERVAL_S, STORE_INTERVAL_S, Tallies
from server.gateway.generation.generator import Generator
from server.gateway.generation.personalizer import Personalizer
from server.gateway.generation.prompts import INDEX_CACHE_BYTES, HistoryIndexer, IndexCache, PromptBuilder
from server.gateway.learning.feedback import Feedbacks
from server.gateway.learning.messages import MessageLearner
from server.gateway.learning.recording import AnswerRecorder
from server.gateway.learning.refreshing import Refreshing
from server.gateway.operating.health import PROBE_INTERVAL_S, Health
from server.gateway.operating.metrics import Metrics
from server.gateway.parts import Gateway, Parts
from server.gateway.users.adapting import Adapting, SampleChecks
from server.gateway.users.histories import HistoryLimit
from server.gateway.users.privacy import Erasing, Exporting
from server.gateway.users.profiles import CHANGES_AT_ONCE, Profiles
from server.observability.background import forever, lower_priority
from server.observability.tracing import Tracing
from server.settings import Settings
from server.store.append_only_file import REWRITE_CHECK_S, AppendOnlyFile
from server.store.figures import FIGURES_INTERVAL_S
from server.store.jobs import JobStore
from server.store.opening import Stores, open_stores
from server.store.samples import JobBudget
from server.store.tenants.user_key import Tenants

log = logging.getLogger("mta.gateway")


@asynccontextmanager
async def open_gateway(
    settings: Settings, metrics: Metrics, keys: KnownKeys, tracing: Tracing
) -> AsyncIterator[Gateway]:
    """Open every part and close them in reverse order; raise if a part cannot serve."""
    embedder = await asyncio.to_thread(lambda: Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir)))
    banks = await asyncio.to_thread(_open_banks, settings.banks, embedder.id)
    async with AsyncExitStack() as stack:
        stores = await _open_stores(stack, settings, metrics, tracing)
        await keys.refresh(stores.keys)
        keys.check_host(settings.host)
        session = await stack.enter_async_context(open_session(settings.engine_timeout_s, **tracing.session_options()))
        # Embedding runs at low priority: on a shared machine, profile writes would slow generations down.
        embedding = stack.enter_context(ThreadPoolExecutor(1, "embed", lower_priority))

        engine_key = next(iter(settings.engine_keys), None)
        engines = Engines(session, settings.engines, engine_key)
        built_for = {bank.manifest.fingerprint: bank.manifest.base_model for bank in banks.values()}
        health = Health(stores.server, engines, built_for, generating=settings.engine_url.rstrip("/"))
        limiter = Limiter(stores.rates, keys, settings, metrics.count_refusal)
        gateways = GatewayShare(stores.rates, engines.urls, lambda: engines.sequences, settings.engine_places)
        stack.push_async_callback(gateways.leave)
        queue = _open_queue(gateways, settings, metrics)
        tenants = Tenants(settings.user_secret, settings.tenant)
        quotas = Quotas(stores.holdings, stores.profiles, stores.rates, keys, tenants, metrics.count_refusal)
        metrics.watch(engines, health, stores.server, quotas.used)
        learner = MessageLearner(metrics.learned.inc, lambda why: metrics.unlearned.labels(why).inc())
        tallies = Tallies(stores.tallies)

        shared = _Shared(
            settings=settings,
            metrics=metrics,
            tracing=tracing,
            stores=stores,
            embedder=embedder,
            embedding=embedding,
            engines=engines,
            engine=EngineClient(session, settings.engine_url, engines, engine_key, metrics.retries.inc),
            limiter=limiter,
            queue=queue,
            quotas=quotas,
            learner=learner,
            tallies=tallies,
            budget=JobBudget(settings.job_tokens, settings.job_seconds),
            checks=SampleChecks(engines, FairQueue(Shares(lambda: 2)), settings.sample_tokens),
            turns=FairQueue(Shares(lambda: 1)),
            changes=FairQueue(Shares(lambda: CHANGES_AT_ONCE)),
        )
        parts = {bank.manifest.short: shared.parts_over(folder, bank, len(banks)) for folder, bank in banks.items()}
        for work in (
            health.watch(),
            forever(PROBE_INTERVAL_S, partial(_count_jobs, stores.jobs, list(parts), metrics), log),
            forever(REWRITE_CHECK_S, partial(_rewrite_file_if_due, stores.file, metrics), log),
            forever(FIGURES_INTERVAL_S, partial(_read_figures, stores, metrics), log),
            forever(STORE_INTERVAL_S, tallies.flush, log),
            forever(FOLD_INTERVAL_S, tallies.fold, log),
            forever(COUNT_INTERVAL_S, quotas.count, log),
            forever(RECOUNT_CHECK_S, quotas.recount, log),
            forever(REFRESH_INTERVAL_S, partial(keys.refresh, stores.keys), log),
            forever(USED_INTERVAL_S, partial(keys.note_used, stores.keys), log),
            forever(COUNT_GATEWAYS_S, gateways.count_gateways, log),
            forever(RENEW_INTERVAL_S, limiter.renew_concurrent, log),
            asyncio.to_thread(_load_search, next(iter(banks.values())).task),
        ):
            stack.push_async_callback(_cancel, asyncio.create_task(work))
        stack.push_async_callback(_last, quotas.count)
        stack.push_async_callback(learner.finish)
        stack.push_async_callback(_last, tallies.flush)
        yield Gateway(settings, metrics, tracing, keys, tenants, health, limiter, learner, tallies, parts)


def _open_banks(folders: Sequence[Path], embedder_id: str) -> dict[Path, ServingBank]:
    """Open the banks, by folder; the first is the default bank."""
    first, *others = folders
    banks = {first: ServingBank.open(first, embedder_id)}
    for folder in others:
        try:
            banks[folder] = ServingBank.open(folder, embedder_id)
        except MtaError as error:
            log.warning("the gateway cannot serve MTA_NEXT_BANK, only engines can: %s", error)
    return banks


async def _open_stores(stack: AsyncExitStack, settings: Settings, metrics: Metrics, tracing: Tracing) -> Stores:
    try:
        stores = await stack.enter_async_context(open_stores(settings, timed=metrics.store, span=tracing.span))
    except ApiError as error:
        raise MtaError(f"MTA_REDIS_URL: {error.explained}") from error
    await stores.rotation.check()
    if not stores.server.durability.is_durable:
        log.warning("Redis can lose acknowledged writes, and with them profiles and keys")
    return stores


def _open_queue(share: GatewayShare, settings: Settings, metrics: Metrics) -> EngineQueue:
    queue = EngineQueue(
        share,
        max_waiting=settings.queue_places,
        patience_s=settings.queue_timeout_s,
        waited=metrics.queue_seconds.observe,
        refused=metrics.count_refusal,
    )
    metrics.queue_running.set_function(lambda: queue.taken)
    metrics.queue_waiting.set_function(lambda: queue.waiting)
    return queue


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the parts of each bank are made of."""

    settings: Settings
    metrics: Metrics
    tracing: Tracing
    stores: Stores
    embedder: Embedder
    embedding: Executor
    engines: Engines
    engine: EngineClient
    limiter: Limiter
    queue: EngineQueue
    quotas: Quotas
    learner: MessageLearner
    tallies: Tallies
    budget: JobBudget
    checks: SampleChecks
    turns: FairQueue  # of embedding
    changes: FairQueue  # of profiles

    def parts_over(self, folder: Path, bank: ServingBank, banks: int) -> Parts:
        """Return the parts of one of so many banks."""
        self.metrics.bank.labels(bank.manifest.short).set(1)
        stores, settings, manifest, profiles = self.stores, self.settings, bank.manifest, self._profiles(bank)
        refreshing = Refreshing(stores, self.quotas, self.limiter, manifest, self.budget, settings)
        cache = IndexCache(INDEX_CACHE_BYTES // banks)
        histories = HistoryIndexer(lambda user: stores.profiles.items(user.key), bank.task, cache)
        return Parts(
            bank,
            profiles,
            Adapting(stores.jobs, stores.adapters, profiles, self.checks, manifest, self.budget, self.tracing),
            Erasing(stores, manifest.short, self.engines.drop),
            Exporting(stores, folder, manifest),
            Feedbacks(stores.feedback, profiles, refreshing, self.tallies),
            Generator(
                Personalizer(bank, profiles),
                PromptBuilder(bank.task, self.engines, histories, settings.queue_timeout_s),
                self.engine,
                self.engines,
                AnswerRecorder(self.metrics, self.tracing, self.tallies, self.learner, profiles),
                limiter=self.limiter,
                queue=self.queue,
                max_prompt_chars=settings.max_prompt_chars,
                default_max_tokens=settings.default_max_tokens,
            ),
        )

    def _profiles(self, bank: ServingBank) -> Profiles:
        short, settings, is_signed = bank.manifest.short, self.settings, bank.manifest.has_signatures
        return Profiles(
            self.stores.rotation,
            embedder=self.embedder,
            task=bank.task,
            executor=self.embedding,
            turns=self.turns,
            places=self.changes,
            limit=HistoryLimit(settings.profile_items, settings.profile_bytes),
            quotas=self.quotas,
            keep_texts=settings.keep_texts,
            signing=self.stores.signing(short) if is_signed else None,
            no_evidence=empty_signature(short, bank.manifest.personal_rows) if is_signed else None,
        )


async def _count_jobs(jobs: JobStore, banks: Iterable[str], metrics: Metrics) -> None:
    """Count the banks' open jobs; keep the last count while the store is down."""
    with suppress(Unavailable):
        backlogs = [await jobs.backlog(bank) for bank in banks]
        metrics.jobs.labels("queued").set(sum(each.waiting for each in backlogs))
        metrics.jobs.labels("running").set(sum(each.open - each.waiting for each in backlogs))
        metrics.oldest_job.set(max(each.oldest_s for each in backlogs))


async def _last(store_counts: Callable[[], Awaitable[None]]) -> None:
    with suppress(Unavailable):  # counts are lost like those of a crash
        await store_counts()


async def _rewrite_file_if_due(file: AppendOnlyFile, metrics: Metrics) -> None:
    metrics.rewrite_overdue.set(await file.overdue_s())
    await file.rewrite_if_due()


async def _read_figures(stores: Stores, metrics: Metrics) -> None:
    metrics.store_servers = await stores.figures()
    metrics.copied.set(await stores.copying.copied_s())


def _load_search(task: Task) -> None:
    """Load the search library in the background: it doubles startup time, and only histories in prompts need it."""
    try:
        ItemIndex(task, ())
    except Exception:
        log.exception("the search library was not loaded: the first history in a prompt tries again")
    gc.freeze()  # again, as at startup


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
