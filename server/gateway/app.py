"""The gateway as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.gateway.access.keys import Caller, KnownKeys, caller_name_of
from server.gateway.access.limiter import RequestUsage
from server.gateway.access.routes import guard
from server.gateway.access.shares import FairQueue, Shares
from server.gateway.experiments.arms import Level
from server.gateway.http.bodies import LARGE_AT_ONCE, BodyReader
from server.gateway.http.errors import ErrorAnswer, add_error_handlers
from server.gateway.opening import open_gateway
from server.gateway.operating.metrics import Metrics
from server.gateway.operating.middleware import AuditLog, HeadRequests, RequestLog
from server.gateway.parts import Gateway
from server.gateway.routes import feedback, generate, jobs, operations, rewrite, users, worth
from server.gateway.routes.console import routes as console
from server.gateway.routes.openai import messages, responses
from server.gateway.routes.openai import routes as openai
from server.gateway.routes.users import EXPORTS_AT_ONCE
from server.observability import open_tracing
from server.settings import Settings

DESCRIPTION = """\
Text in each user's own style, from one base model. `PUT /users/{user_id}/profile` stores what is known about a user;
`POST /generate` and the OpenAI-compatible routes under `/v1` answer in that user's style. Errors have OpenAI's shape,
`{"error": {"message", "type", "param", "code"}}`. Once API keys exist, every call needs a key with the route's scope:
`Authorization: Bearer KEY`.
"""


def create_app(settings: Settings) -> FastAPI:
    """Create the application; its lifespan opens all parts."""
    metrics, keys = Metrics(settings.named_tenants, Level), KnownKeys(settings.tenant)
    tracing = open_tracing(settings, "mta-gateway")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_gateway(settings, metrics, keys, tracing) as app.state.gateway:
            yield
        await asyncio.to_thread(tracing.close)

    def counted(caller: Caller, user_id: str | None, *, generates: bool) -> AbstractAsyncContextManager[RequestUsage]:
        gateway: Gateway = app.state.gateway
        return gateway.counted(caller, user_id, generates=generates)

    app = FastAPIOffline(
        redoc_url=None,
        static_url="/docs/files",
        title="MTA server",
        version=version("mta-server"),
        description=DESCRIPTION,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
        lifespan=lifespan,
        redirect_slashes=False,
    )
    large = FairQueue(Shares(lambda: LARGE_AT_ONCE))
    app.state.bodies = BodyReader(lambda request: large.held(caller_name_of(request)))
    app.state.exports = FairQueue(Shares(lambda: EXPORTS_AT_ONCE))
    app.add_middleware(HeadRequests)
    app.add_middleware(AuditLog)
    app.add_middleware(RequestLog, metrics=metrics, tracing=tracing)  # the last one is the outermost
    for part in (generate, rewrite, openai, responses, messages, users, feedback, jobs, worth, operations, console):
        app.include_router(part.router)
    guard(app, keys, settings.max_requests, counted=counted, refused=metrics.count_refusal)
    add_error_handlers(app)
    tracing.watch_app(app)
    return app
