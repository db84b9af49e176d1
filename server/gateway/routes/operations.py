"""`/health`, `/ready`, `/metrics`: for those who run the server."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from server.gateway.access.caller import is_admin
from server.gateway.engines.admin import AddressState, EngineState
from server.gateway.operating.health import Readiness, Report, StoreState
from server.gateway.operating.metrics import CONTENT_TYPE
from server.gateway.parts import Parts, usual_parts

router = APIRouter(tags=["operations"])

_FOR_ADMIN = "Null without the scope admin."


class BankPart(BaseModel, frozen=True):
    """The bank that is served; it was checked at startup."""

    status: Literal["ok"] = "ok"
    fingerprint: str = Field(description="64 hex digits; recipes begin with the first eight.")
    task: str
    anchors: int


class EmbedderPart(BaseModel, frozen=True):
    """The embedder; it was checked at startup."""

    status: Literal["ok"] = "ok"
    id: str
    dim: int


class Unseen(BaseModel, frozen=True):
    """A part that has not been looked at yet."""

    status: Literal[Readiness.NOT_YET_SEEN] = Readiness.NOT_YET_SEEN


class PartsAnswer(BaseModel, frozen=True):
    """Every part, as it was last seen."""

    bank: BankPart
    embedder: EmbedderPart
    redis: StoreState | Unseen
    engine_url: AddressState | Unseen
    engines: tuple[EngineState, ...]


class HealthAnswer(BaseModel, frozen=True):
    """The process is alive."""

    status: Literal["ok"] = "ok"
    parts: PartsAnswer | None = Field(None, description=_FOR_ADMIN)


class ReadyAnswer(BaseModel, frozen=True):
    """Whether requests can be answered."""

    status: Readiness = Field(description="Without the scope admin, `ready` or `not_ready`.")
    detail: str | None = Field(None, description="What is missing, or what to do.")
    seen_s_ago: float | None = Field(None, description="How old the last look is, in seconds.")
    parts: PartsAnswer | None = Field(None, description=_FOR_ADMIN)


@router.get("/health")
async def health(request: Request) -> HealthAnswer:
    """Whether this process is alive: 200 if it answers. The parts are as they were last seen; nothing is probed."""
    if not is_admin(request):
        return HealthAnswer()
    parts = usual_parts(request)
    return HealthAnswer(parts=_parts(parts, parts.health.last))


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
    parts = usual_parts(request)
    report, readiness = parts.health.last, parts.health.readiness
    response.status_code = 200 if readiness is Readiness.READY else 503
    if not is_admin(request):
        return ReadyAnswer(status=Readiness.READY if readiness is Readiness.READY else Readiness.NOT_READY)
    stale = "the gateway's watch over its parts hangs or has ended: restart the gateway; its log may say why"
    return ReadyAnswer(
        status=readiness,
        detail=stale if readiness is Readiness.STALE else report and report.missing,
        seen_s_ago=round(report.age_s, 1) if report else None,
        parts=_parts(parts, report),
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(usual_parts(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _parts(parts: Parts, report: Report | None) -> PartsAnswer:
    manifest = parts.bank.manifest
    return PartsAnswer(
        bank=BankPart(fingerprint=manifest.fingerprint, task=manifest.task, anchors=len(manifest.anchors)),
        embedder=EmbedderPart(id=manifest.embedder.id, dim=manifest.embedder.dim),
        redis=report.store if report else Unseen(),
        engine_url=report.generating if report else Unseen(),
        engines=report.engines if report else (),
    )
