"""`/health`, `/ready`, `/metrics`: for those who run the server."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from server.gateway.access.keys import is_admin
from server.gateway.operating.health import BankPart, EmbedderPart, PartStates, ProbeResult, Readiness, Unseen
from server.gateway.operating.metrics import CONTENT_TYPE
from server.gateway.parts import Parts, gateway_of

router = APIRouter(tags=["operations"])

_FOR_ADMIN = "Null without the scope admin."


class HealthAnswer(BaseModel, frozen=True):
    """The process is alive."""

    status: Literal["ok"] = "ok"
    parts: PartStates | None = Field(None, description=_FOR_ADMIN)


class ReadyAnswer(BaseModel, frozen=True):
    """Whether requests can be answered."""

    status: Readiness = Field(description="Without the scope admin, `ready` or `not_ready`.")
    detail: str | None = Field(None, description="What is missing, or what to do.")
    seen_s_ago: float | None = Field(None, description="How old the last look is, in seconds.")
    parts: PartStates | None = Field(None, description=_FOR_ADMIN)


@router.get("/health")
async def health(request: Request) -> HealthAnswer:
    """Whether this process is alive: 200 if it answers. The parts are as they were last seen; nothing is probed."""
    if not is_admin(request):
        return HealthAnswer()
    parts = gateway_of(request).usual
    return HealthAnswer(parts=_states(parts, parts.health.last))


@router.get(
    "/ready", responses={503: {"model": ReadyAnswer, "description": "A part that every request needs is not ready."}}
)
async def ready(request: Request, response: Response) -> ReadyAnswer:
    """Whether requests can be fully served: 503 if not.

    Ready means that most users can be served from the store, and that for each bank that is served at least one engine
    with it can be reached; `detail` says what is missing all the same. This is what was last seen, at most a few
    seconds ago; nothing is probed. Before the first look `status` is `not_yet_seen`; when the last one is too old to
    rely on, it is `stale`.
    """
    parts = gateway_of(request).usual
    last, readiness = parts.health.last, parts.health.readiness
    response.status_code = 200 if readiness is Readiness.READY else 503
    if not is_admin(request):
        return ReadyAnswer(status=Readiness.READY if readiness is Readiness.READY else Readiness.NOT_READY)
    stale = "the gateway's watch over its parts hangs or has ended: restart the gateway; its log may say why"
    return ReadyAnswer(
        status=readiness,
        detail=stale if readiness is Readiness.STALE else last and last.missing,
        seen_s_ago=round(last.age_s, 1) if last else None,
        parts=_states(parts, last),
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(gateway_of(request).usual.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _states(parts: Parts, last: ProbeResult | None) -> PartStates:
    manifest = parts.bank.manifest
    return PartStates(
        bank=BankPart(fingerprint=manifest.fingerprint, task=manifest.task, anchors=len(manifest.anchors)),
        embedder=EmbedderPart(id=manifest.embedder.id, dim=manifest.embedder.dim),
        redis=last.store if last else Unseen(),
        engine_url=last.generating if last else Unseen(),
        engines=last.engines if last else (),
    )
