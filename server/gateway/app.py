"""The gateway put together: its parts, and the application around them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from adapters.errors import MtaError
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.models.folders import ensure_embedder
from server.errors import ApiError, Unavailable
from server.gateway.access.authentication import Authentication
from server.gateway.access.caller import name_of
from server.gateway.access.known_keys import LOOK_AGAIN_S, KnownKeys
from server.gateway.access.limiter import Limiter
from server.gateway.access.places import LOOK_S as COUNT_GATEWAYS_S
from server.gateway.access.places import SharedPlaces
from server.gateway.access.queue import EngineQueue
from server.gateway.access.routes import guard
from server.gateway.access.running import RENEW_S
from server.gateway.access.shares import Line, Shares
from server.gateway.assembly import Shared, parts_over
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import EngineClient, open_session
from server.gateway.engines.tokenizer import TokenizerClient
from server.gateway.engines.ways import Ways
from server.gateway.http.bodies import LARGE_AT_ONCE, Bodies
from server.gateway.http.errors import add_error_handlers
from server.gateway.http.middleware import RequestLog
from server.gateway.operating.health import PROBE_INTERVAL_S, Health
from server.gateway.operating.metrics import GENERATING, Metrics
from server.gateway.parts import Banks
from server.gateway.routes import generate, jobs, operations, users
from server.gateway.routes.console import bank as console_bank
from server.gateway.routes.console import pages
from server.gateway.routes.openai import routes as openai
from server.settings import Settings
from server.store.durability import LOOK_S, ForgetsOnDisk
from server.store.jobs import JobStore
from server.store.opening import open_stores
from server.store.tenants.rates import Allowance
from server.store.tenants.user_key import Tenants
from server.watching.background import forever, stand_back
from server.watching.tracing import Tracing, open_tracing

log = logging.getLogger("mta.gateway")

MAX_BODY_BYTES = 8 << 20
BODY_TIMEOUT_S = 60.0
"""For a body to arrive. For how long it is remembered that somebody unknown was erased must be longer."""

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
            large = Line(Shares(lambda: LARGE_AT_ONCE))
            app.state.bodies = Bodies(
                body_thread,
                MAX_BODY_BYTES,
                BODY_TIMEOUT_S,
                lambda request: large.place(name_of(request)),
            )
            async with _opened(settings, metrics, keys, tracing) as app.state.banks:
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
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(RequestLog, counts=metrics, generating=GENERATING, tracing=tracing)
    for part in (generate, openai, users, jobs, operations, console_bank, pages):
        app.include_router(part.router)
    guard(app, settings.max_requests, metrics)
    add_error_handlers(app)
    tracing.watch_app(app)
    return app


@asynccontextmanager
async def _opened(settings: Settings, metrics: Metrics, keys: KnownKeys, tracing: Tracing) -> AsyncIterator[Banks]:
    """Open every part, refuse to start if one cannot serve, and close them in turn.

    Raises:
        MtaError: naming what is missing or damaged.
    """
    folders = settings.banks
    tenants = Tenants(settings.secret.get_secret_value() if settings.secret else None, settings.tenant)
    embedder = await asyncio.to_thread(_open_embedder, settings)
    banks = await asyncio.to_thread(_open_banks, folders, embedder.id)
    usual = next(iter(banks.values()))
    engine_key = settings.engine_key.get_secret_value() if settings.engine_key else None
    async with AsyncExitStack() as stack:
        try:
            stores = await stack.enter_async_context(open_stores(settings, timed=metrics.store, span=tracing.span))
        except ApiError as error:
            raise MtaError(f"MTA_REDIS_URL: {error.explained}") from error
        await keys.look(stores.keys)
        keys.check_host(settings.host)
        if not stores.server.durability.lasts:
            log.warning("Redis does not guarantee to keep acknowledged writes: profiles and keys can be lost")
        session = await stack.enter_async_context(open_session(settings.engine_timeout_s, **tracing.session_options()))
        # They stand back: on one machine, writes would slow answers down.
        threads = stack.enter_context(ThreadPoolExecutor(1, "embed", stand_back))
        engines = Engines(session, settings.engines, engine_key)
        ways = Ways(settings.engine_url, engines)
        engine = EngineClient(session, ways, engine_key, metrics.retries.inc)
        tokenizer = TokenizerClient(session, engines, engine_key)
        fingerprints = [bank.manifest.fingerprint for bank in banks.values()]
        health = Health(stores.server, engines, fingerprints, generating=settings.engine_url)
        metrics.watch(lambda: engines.figures, lambda: health.readiness, lambda: stores.server.memory)
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

        shorts = [bank.manifest.short for bank in banks.values()]
        for beside in (
            health.watch(),
            forever(PROBE_INTERVAL_S, partial(_count_jobs, stores.jobs, shorts, metrics), log),
            forever(LOOK_S, partial(_look_at_file, stores.file, metrics), log),
            forever(LOOK_AGAIN_S, partial(keys.look, stores.keys), log),
            forever(COUNT_GATEWAYS_S, places.look, log),
            forever(RENEW_S, limiter.renew, log),
            asyncio.to_thread(_load_search, usual.task),
        ):
            stack.push_async_callback(_stopped, asyncio.create_task(beside))
        for short in shorts:
            metrics.bank.labels(short).set(1)
        shared = Shared(
            settings=settings,
            tenants=tenants,
            stores=stores,
            embedder=embedder,
            embedding=threads,
            engine=engine,
            engines=engines,
            tokenizer=tokenizer,
            limiter=limiter,
            queue=queue,
            health=health,
            metrics=metrics,
            tracing=tracing,
        )
        yield Banks(parts_over(banks, shared), keys)


def _open_banks(folders: Sequence[Path], embedder_id: str) -> dict[Path, ServingBank]:
    """The banks by their folders, first the one for all tenants that name none.

    Raises:
        MtaError: when that one cannot be served.
    """
    first, *others = folders
    banks = {first: ServingBank.open(first, embedder_id)}
    for folder in others:
        try:
            banks[folder] = ServingBank.open(folder, embedder_id)
        except MtaError as error:
            log.warning("the next bank is for engines alone, tenants cannot name it here: %s", error)
    return banks


async def _count_jobs(jobs: JobStore, banks: Sequence[str], metrics: Metrics) -> None:
    """Count the banks' open jobs; while the store is away the last count stays, and `/ready` says why."""
    with contextlib.suppress(Unavailable):
        found = [await jobs.backlog(bank) for bank in banks]
        metrics.jobs.labels("queued").set(sum(each.waiting for each in found))
        metrics.jobs.labels("running").set(sum(each.open - each.waiting for each in found))
        metrics.oldest_job.set(max(each.oldest_s for each in found))


async def _look_at_file(file: ForgetsOnDisk, metrics: Metrics) -> None:
    metrics.rewrite_overdue.set(await file.overdue_s())
    await file.look()


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
