"""`/health`, `/ready`, `/metrics`: for those who run the server."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.gateway.health import Readiness, Report
from server.gateway.metrics import CONTENT_TYPE
from server.gateway.parts import Parts, parts_of

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether this process lives: 200 when it answers. The parts are as they were last seen; nothing is asked."""
    parts = parts_of(request)
    return {"status": "ok", "parts": _parts(parts, parts.health.last)}


@router.get("/ready", responses={503: {"description": "A part that every request needs is not ready."}})
async def ready(request: Request) -> JSONResponse:
    """Whether requests can be answered as they should be: 503 when not.

    Ready means that the store can be used, the address that generates can be reached, and so can one engine that has
    the bank. It is what was last seen, a few seconds ago at most; nothing is asked. Before the first look `status` is
    `not_yet_seen`, and `stale` when the last one is too old to say anything.
    """
    parts = parts_of(request)
    report, readiness = parts.health.last, parts.health.readiness
    content = {
        "status": readiness.value,
        "detail": None,
        "seen_s_ago": round(report.age_s, 1) if report else None,
        "parts": _parts(parts, report),
    }
    if readiness is Readiness.STALE:
        content["detail"] = "the gateway's watch over its parts hangs or has ended: its log may say why; restart it"
    return JSONResponse(content, status_code=200 if readiness is Readiness.READY else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus."""
    return Response(parts_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _parts(parts: Parts, report: Report | None) -> dict[str, Any]:
    manifest = parts.bank.manifest
    return {
        "bank": {
            "status": "ok",
            "fingerprint": manifest.fingerprint,
            "task": manifest.task,
            "anchors": len(manifest.anchors),
        },
        "embedder": {"status": "ok", "id": manifest.embedder.id, "dim": manifest.embedder.dim},
        "redis": asdict(report.store) if report else {"status": Readiness.NOT_YET_SEEN.value},
        "engine_url": asdict(report.generating) if report else {"status": Readiness.NOT_YET_SEEN.value},
        "engines": [asdict(engine) for engine in report.engines] if report else [],
    }
