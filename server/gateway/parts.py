"""Opens, connects and closes the parts of a gateway."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import Request

from adapters.errors import MtaError
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.lookup.signature import empty_signature
from bank.models.folders import ensure_embedder
from server.errors import ApiError, Unavailable
from server.gateway.access.keys import REFRESH_INTERVAL_S, USED_INTERVAL_S, KnownKeys, caller_of
from server.gateway.access.limiter import RENEW_INTERVAL_S, Limiter
from server.gateway.access.queue import COUNT_GATEWAYS_S, EngineQueue, GatewayShare
from server.gateway.access.quotas import COUNT_INTERVAL_S, RECOUNT_CHECK_S, Quotas
from server.gateway.access.shares import FairQueue, Shares
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import EngineClient, open_session
from server.gateway.generation.generator import Generator
from server.gateway.generation.personalizer import Personalizer
from server.gateway.generation.prompts import INDEX_CACHE_BYTES, HistoryIndexer, IndexCache, PromptBuilder
from server.gateway.learning.feedback import Feedbacks
from server.gateway.learning.messages import MessageLearner
from server.gateway.learning.refreshing import Refreshing
from server.gateway.learning.tallies import FOLD_INTERVAL_S, STORE_INTERVAL_S, Tallies
from server.gateway.operating.health import PROBE_INTERVAL_S, Health
from server.gateway.operating.metrics import Metrics
from server.gateway.users.adapting import Adapting, SampleChecks
from server.gateway.users.histories import HistoryLimit
from server.gateway.users.privacy import Erasing, Exporting
from server.gateway.users.profiles import CHANGES_AT_ONCE, Profiles
from server.settings import Settings
from server.store.append_only_file import REWRITE_CHECK_S, AppendOnlyFile
from server.store.figures import FIGURES_INTERVAL_S
from server.store.jobs import JobStore
from server.store.opening import Stores, open_stores
from server.store.samples import JobBudget
from server.store.tenants.user_key import Tenants, User, UserKeys
from server.watching.background import forever, lower_priority
from server.watching.tracing import Tracing

log = logging.getLogger("mta.gateway")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a gateway for one bank; parts that do not depend on the bank are shared by all banks."""

    settings: Settings
    tenants: Tenants
    bank: ServingBank
    profiles: Profiles
    adapting: Adapting
    erasing: Erasing
    exporting: Exporting
    feedbacks: Feedbacks
    learner: MessageLearner
    tallies: Tallies
    generator: Generator
    limiter: Limiter
    health: Health
    metrics: Metrics
    tracing: Tracing


@dataclass(frozen=True, slots=True)
class Gateway:
    parts: Mapping[str, Parts]  # by the first 8 hex digits of the bank; the first entry is the default bank
    keys: KnownKeys

    @property
    def default_parts(self) -> Parts:
        return next(iter(self.parts.values()))

    def of(self, tenant: str) -> Parts:
        if (named := self.keys.bank_of(tenant)) is None:
            return self.default_parts
        if (parts := self.parts.get(named)) is None:
            raise Unavailable(
                f"this tenant's bank, {named}, is not served here, only {', '.join(self.parts)}: set MTA_BANK or "
                "MTA_NEXT_BANK to its folder, or choose another with `mta keys bank`",
                code="no_bank",
            )
        return parts


@asynccontextmanager
async def open_gateway(
    settings: Settings, metrics: Metrics, keys: KnownKeys, tracing: Tracing
) -> AsyncIterator[Gateway]:
    """Open every part and close them in reverse order; raise if a part cannot serve."""
    tenants = Tenants(settings.user_secret, settings.tenant)
    embedder = await asyncio.to_thread(lambda: Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir)))
    banks = await asyncio.to_thread(_open_banks, settings.banks, embedder.id)
    engine_key = next(iter(settings.engine_keys), None)
    async with AsyncExitStack() as stack:
        try:
            stores = await stack.enter_async_context(open_stores(settings, timed=metrics.store, span=tracing.span))
        except ApiError as error:
            raise MtaError(f"MTA_REDIS_URL: {error.explained}") from error
        await stores.rotation.check()
        await keys.refresh(stores.keys)
        keys.check_host(settings.host)
        if not stores.server.durability.is_durable:
            log.warning("Redis can lose acknowledged writes, and with them profiles and keys")
        session = await stack.enter_async_context(open_session(settings.engine_timeout_s, **tracing.session_options()))
        # Embedding runs at low priority: on a shared machine, profile writes would slow generations down.
        embedding = stack.enter_context(ThreadPoolExecutor(1, "embed", lower_priority))

        engines = Engines(session, settings.engines, engine_key)
        engine = EngineClient(session, settings.engine_url, engines, engine_key, metrics.retries.inc)
        built_for = {bank.manifest.fingerprint: bank.manifest.base_model for bank in banks.values()}
        health = Health(stores.server, engines, built_for, generating=settings.engine_url.rstrip("/"))

        limiter = Limiter(stores.rates, keys, settings, metrics.count_refusal)
        share = GatewayShare(stores.rates, engines.urls, lambda: engines.sequences, settings.engine_places)
        stack.push_async_callback(share.leave)
        queue = EngineQueue(
            share,
            max_waiting=settings.queue_places,
            patience_s=settings.queue_timeout_s,
            waited=metrics.queue_seconds.observe,
            refused=metrics.count_refusal,
        )
        quotas = Quotas(stores.holdings, stores.profiles, stores.rates, keys, tenants, metrics.count_refusal)
        metrics.watch(engines, health, stores.server, quotas.used)
        metrics.queue_running.set_function(lambda: queue.taken)
        metrics.queue_waiting.set_function(lambda: queue.waiting)

        budget = JobBudget(settings.job_tokens, settings.job_seconds)
        learner = MessageLearner(metrics.learned.inc, lambda why: metrics.unlearned.labels(why).inc())
        tallies = Tallies(stores.worth)

        turns, changing = FairQueue(Shares(lambda: 1)), FairQueue(Shares(lambda: CHANGES_AT_ONCE))  # over all banks
        checks = SampleChecks(engines, FairQueue(Shares(lambda: 2)), settings.sample_tokens)
        limit = HistoryLimit(settings.profile_items, settings.profile_bytes)

        def parts_over(folder: Path, bank: ServingBank) -> Parts:
            short, has_signatures = bank.manifest.short, bank.manifest.has_signatures
            metrics.bank.labels(short).set(1)
            profiles = Profiles(
                stores.rotation,
                embedder=embedder,
                task=bank.task,
                executor=embedding,
                turns=turns,
                places=changing,
                limit=limit,
                quotas=quotas,
                keep_texts=settings.keep_texts,
                signing=stores.signing(short) if has_signatures else None,
                no_evidence=empty_signature(short, bank.manifest.personal_rows) if has_signatures else None,
            )
            cache = IndexCache(INDEX_CACHE_BYTES // len(banks))
            refreshing = Refreshing(stores, quotas, limiter, bank.manifest, budget, settings)
            histories = HistoryIndexer(lambda user: stores.profiles.items(user.key), bank.task, cache)
            return Parts(
                settings=settings,
                tenants=tenants,
                bank=bank,
                profiles=profiles,
                adapting=Adapting(stores.jobs, stores.adapters, profiles, checks, bank.manifest, budget, tracing),
                erasing=Erasing(stores, short, engines.drop),
                exporting=Exporting(stores, folder, bank.manifest),
                feedbacks=Feedbacks(stores.feedback, profiles, refreshing, tallies),
                learner=learner,
                tallies=tallies,
                generator=Generator(
                    Personalizer(bank, profiles),
                    PromptBuilder(bank.task, engines, histories, settings.queue_timeout_s),
                    engine,
                    engines,
                    limiter=limiter,
                    queue=queue,
                    max_prompt_chars=settings.max_prompt_chars,
                    default_max_tokens=settings.default_max_tokens,
                ),
                limiter=limiter,
                health=health,
                metrics=metrics,
                tracing=tracing,
            )

        parts = {bank.manifest.short: parts_over(folder, bank) for folder, bank in banks.items()}
        for background in (
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
            forever(COUNT_GATEWAYS_S, share.count_gateways, log),
            forever(RENEW_INTERVAL_S, limiter.renew_concurrent, log),
            asyncio.to_thread(_load_search, next(iter(banks.values())).task),
        ):
            stack.push_async_callback(_cancel, asyncio.create_task(background))
        stack.push_async_callback(_last, quotas.count)
        stack.push_async_callback(learner.finish)
        stack.push_async_callback(_last, tallies.flush)
        yield Gateway(parts, keys)


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


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def parts_of(request: Request) -> Parts:
    """Return the parts for the bank of the caller's tenant."""
    return gateway_of(request).of(caller_of(request).tenant)


def users_of(request: Request) -> UserKeys:
    return gateway_of(request).default_parts.tenants.users(caller_of(request).tenant)


def user_of(request: Request, user_id: str) -> User:
    """Return the user that a request names, within the caller's tenant."""
    return users_of(request).user(user_id)
