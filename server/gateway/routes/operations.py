"""`/health`, `/ready` and `/metrics`, for operators."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from server.gateway.access.keys import is_admin
from server.gateway.operating.health import BankPart, EmbedderPart, PartStates, ProbeResult, Readiness, Unseen
from server.gateway.operating.metrics import CONTENT_TYPE
from server.gateway.parts import Gateway, gateway_of

router = APIRouter(tags=["operations"])

_FOR_ADMIN = "Null without the scope `admin`."


class HealthAnswer(BaseModel, frozen=True):
    status: Literal["ok"] = "ok"
    parts: PartStates | None = Field(None, description=_FOR_ADMIN)


class ReadyAnswer(BaseModel, frozen=True):
    status: Readiness = Field(description="Without the scope `admin`: `ready` or `not_ready`.")
    detail: str | None = Field(None, description="What is missing, or what to do.")
    seen_s_ago: float | None = Field(None, description="Age of the last probe, in seconds.")
    parts: PartStates | None = Field(None, description=_FOR_ADMIN)


@router.get("/health")
async def health(request: Request) -> HealthAnswer:
    """Report that the process is alive: always 200. Returns the last known state of the parts without probing them."""
    if not is_admin(request):
        return HealthAnswer()
    gateway = gateway_of(request)
    return HealthAnswer(parts=_states(gateway, gateway.health.last))


@router.get(
    "/ready", responses={503: {"model": ReadyAnswer, "description": "A part that every request needs is not ready."}}
)
async def ready(request: Request, response: Response) -> ReadyAnswer:
    """Report whether requests can be fully served: 503 if not.

    Ready means that the store can serve most users and that, for each served bank, at least one engine with that bank
    can be reached; `detail` lists whatever else is missing. The result is that of the last probe, at most a few seconds
    ago; the request itself probes nothing. `status` is `not_yet_seen` before the first probe, and `stale` if the last
    probe is too old.
    """
    gateway = gateway_of(request)
    last, readiness = gateway.health.last, gateway.health.readiness
    response.status_code = 200 if readiness is Readiness.READY else 503
    if not is_admin(request):
        return ReadyAnswer(status=Readiness.READY if readiness is Readiness.READY else Readiness.NOT_READY)
    stale = "the gateway's health probe hangs or has stopped: restart the gateway; its log may give the reason"
    return ReadyAnswer(
        status=readiness,
        detail=stale if readiness is Readiness.STALE else last and last.missing,
        seen_s_ago=round(last.age_s, 1) if last else None,
        parts=_states(gateway, last),
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return metrics in Prometheus's text format."""
    return Response(gateway_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _states(gateway: Gateway, last: ProbeResult | None) -> PartStates:
    manifest = gateway.default_parts.bank.manifest
    return PartStates(
        bank=BankPart(fingerprint=manifest.fingerprint, task=manifest.task, anchors=len(manifest.anchors)),
        embedder=EmbedderPart(id=manifest.embedder.id, dim=manifest.embedder.dim),
        redis=last.store if last else Unseen(),
        engine_url=last.generating if last else Unseen(),
        engines=last.engines if last else (),
    )
