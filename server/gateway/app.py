"""The gateway put together: its parts, and the application around them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI

from adapters.errors import MtaError
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.models.folders import ensure_embedder
from server.errors import ApiError, Unavailable
from server.gateway.access.authentication import Authentication
from server.gateway.access.known_keys import LOOK_AGAIN_S, KnownKeys
from server.gateway.access.limiter import RENEW_S, Allowance, Limiter
from server.gateway.access.places import LOOK_S as COUNT_GATEWAYS_S
from server.gateway.access.places import SharedPlaces
from server.gateway.access.queue import EngineQueue
from server.gateway.access.routes import guard
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import EngineClient, open_session
from server.gateway.engines.tokenizer import TokenizerClient
from server.gateway.engines.ways import Ways
from server.gateway.generation.generator import Generator
from server.gateway.generation.index_cache import IndexCache
from server.gateway.generation.personalizer import Personalizer
from server.gateway.generation.recall import Recall
from server.gateway.http.bodies import Bodies
from server.gateway.http.errors import add_error_handlers
from server.gateway.http.middleware import Places, RequestLog
from server.gateway.operating.health import PROBE_INTERVAL_S, Health
from server.gateway.operating.metrics import GENERATING, Metrics
from server.gateway.parts import Parts
from server.gateway.routes import generate, jobs, operations, users
from server.gateway.routes.console import bank as console_bank
from server.gateway.routes.console import pages
from server.gateway.routes.openai import routes as openai
from server.gateway.users.adapting import Adapting
from server.gateway.users.erasing import Erasing
from server.gateway.users.exporting import Exporting
from server.gateway.users.history import HistoryLimit
from server.gateway.users.profiles import Profiles
from server.gateway.users.sample_checks import SampleChecks
from server.settings import Settings
from server.store.durability import LOOK_S, Durability
from server.store.jobs import JobStore
from server.store.opening import open_stores
from server.store.samples import JobBudget
from server.store.tenants.user_key import Tenants
from server.watching.repeating import forever
from server.watching.tracing import Tracing, open_tracing

log = logging.getLogger("mta.gateway")

NICENESS = 10
"""Of threads that embed: they get about a tenth of a core that something else wants."""

DESCRIPTION = """\
Text in each user's own manner, from one base model. `PUT /users/{user_id}/profile` tells the server about a user,
`POST /generate` answers as that user, and so do OpenAI's own routes under `/v1`. Errors have OpenAI's shape,
`{"error": {"message", "type", "param", "code"}}`. Once API keys exist, every call needs one that has the call's scope:
`Authorization: Bearer KEY`.
"""


def create_app(settings: Settings) -> FastAPI:
    """The gateway as an ASGI application. Nothing is opened before its lifespan starts."""
    metrics, keys = Metrics(settings.named_tenants), KnownKeys(settings.tenant)
    tracing = open_tracing(settings, "mta-gateway")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ThreadPoolExecutor(1, thread_name_prefix="bodies") as body_thread:
            app.state.bodies = Bodies(body_thread, settings.max_body_bytes, settings.body_timeout_s)
            async with _opened(settings, metrics, keys, tracing) as app.state.parts:
                yield
        await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="MTA server",
        version=version("mta-server"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    # The last one added is the outermost.
    app.add_middleware(Places, most=settings.max_requests)
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(RequestLog, counts=metrics, generating=GENERATING, tracing=tracing)
    for part in (generate, openai, users, jobs, operations, console_bank, pages):
        app.include_router(part.router)
    guard(app)
    add_error_handlers(app)
    tracing.watch_app(app)
    return app


@asynccontextmanager
async def _opened(settings: Settings, metrics: Metrics, keys: KnownKeys, tracing: Tracing) -> AsyncIterator[Parts]:
    """Open every part, refuse to start if one cannot serve, and close them in turn.

    Raises:
        MtaError: naming what is missing or damaged.
    """
    bank_folder = settings.bank_folder()
    tenants = Tenants(settings.secret.get_secret_value() if settings.secret else None, settings.tenant)
    embedder = await asyncio.to_thread(_open_embedder, settings)
    bank = await asyncio.to_thread(ServingBank.open, bank_folder, embedder.id)
    engine_key = settings.engine_key.get_secret_value() if settings.engine_key else None
    async with AsyncExitStack() as stack:
        try:
            stores = await stack.enter_async_context(open_stores(settings, timed=metrics.store))
        except ApiError as error:
            raise MtaError(f"MTA_REDIS_URL: {error.explained}") from error
        await keys.look(stores.keys)
        keys.check_host(settings.host)
        if stores.server.durability is Durability.NONE:
            log.warning("Redis does not guarantee to keep acknowledged writes: profiles can be lost")
        session = await stack.enter_async_context(open_session(settings.engine_timeout_s, **tracing.session_options()))
        threads = stack.enter_context(ThreadPoolExecutor(settings.embed_threads, "embed", _stand_back))
        signing = stores.signing(bank.manifest.short) if bank.signs else None
        profiles = Profiles(
            stores.profiles,
            embedder=embedder,
            task=bank.task,
            executor=threads,
            limit=HistoryLimit(settings.profile_items, settings.profile_bytes),
            signing=signing,
        )
        personalizer = Personalizer(bank, profiles)
        engines = Engines(session, settings.engines, engine_key)
        ways = Ways(settings.engine_url, engines)
        engine = EngineClient(session, ways, engine_key, metrics.retries.inc)
        tokenizer = TokenizerClient(session, engines, engine_key)
        health = Health(stores.server, engines, bank.manifest.fingerprint, generating=settings.engine_url)
        metrics.watch(lambda: engines.figures, lambda: health.readiness)
        limiter = Limiter(
            stores.rates,
            per_key=Allowance(
                requests=settings.key_requests,
                tokens=settings.key_tokens,
                jobs=settings.key_jobs,
                concurrent=settings.key_concurrent,
            ),
            per_user=Allowance(settings.user_requests, settings.user_tokens, settings.user_jobs),
            metrics=metrics,
        )
        places = SharedPlaces(engines, stores.rates, settings.engine_places)
        stack.push_async_callback(places.leave)
        queue = EngineQueue(
            places, most_waiting=settings.queue_places, patience_s=settings.queue_timeout_s, metrics=metrics
        )

        for beside in (
            health.watch(),
            forever(PROBE_INTERVAL_S, partial(_count_jobs, stores.jobs, bank.manifest.short, metrics), log),
            forever(LOOK_S, stores.file.look, log),
            forever(LOOK_AGAIN_S, partial(keys.look, stores.keys), log),
            forever(COUNT_GATEWAYS_S, places.look, log),
            forever(RENEW_S, limiter.renew, log),
            asyncio.to_thread(_load_search, bank.task),
        ):
            stack.push_async_callback(_stopped, asyncio.create_task(beside))
        metrics.bank.labels(bank.manifest.short).set(1)
        indexes = IndexCache(settings.history_cache_mib << 20)
        recall = Recall(profiles, bank.task, tokenizer, indexes)
        generator = Generator(
            personalizer,
            recall,
            engine,
            engines,
            limiter=limiter,
            queue=queue,
            max_prompt_chars=settings.max_prompt_chars,
            metrics=metrics,
        )
        adapting = Adapting(
            stores.jobs,
            profiles,
            checks=SampleChecks(tokenizer, engines),
            manifest=bank.manifest,
            task=bank.task,
            max_sample_bytes=settings.max_item_bytes,
            budget=JobBudget(settings.job_tokens, settings.job_seconds),
            tracing=tracing,
        )
        erasing = Erasing(
            stores.profiles,
            adapters=stores.adapters,
            jobs=stores.jobs,
            signing=signing,
            bank=bank.manifest.short,
            log_file=stores.file,
            engines=engines,
        )
        exporting = Exporting(
            stores.profiles,
            jobs=stores.jobs,
            adapters=stores.adapters,
            bank=bank_folder,
            manifest=bank.manifest,
        )
        yield Parts(
            settings=settings,
            tenants=tenants,
            bank=bank,
            profiles=profiles,
            adapting=adapting,
            erasing=erasing,
            exporting=exporting,
            personalizer=personalizer,
            generator=generator,
            limiter=limiter,
            health=health,
            metrics=metrics,
            tracing=tracing,
        )


async def _count_jobs(jobs: JobStore, bank: str, metrics: Metrics) -> None:
    """Count a bank's open jobs; while the store is away the last count stays, and `/ready` says why."""
    with contextlib.suppress(Unavailable):
        unfinished, waiting = await jobs.open_jobs(bank), await jobs.waiting_jobs(bank)
        metrics.jobs.labels("queued").set(waiting)
        metrics.jobs.labels("running").set(max(0, unfinished - waiting))
        metrics.oldest_job.set(await jobs.oldest_waiting_s(bank))


def _stand_back() -> None:
    """Have the scheduler prefer whatever else runs to this thread: on one machine, writes would slow answers down."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _open_embedder(settings: Settings) -> Embedder:
    return Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))


def _load_search(task: Task) -> None:
    """Load the search library, which takes as long as all the rest: nothing but histories in prompts needs it."""
    ItemIndex(task, ())
    gc.freeze()  # as when the gateway began to listen


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
