"""`/health`, `/ready`, `/metrics`: for those who run the server."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.health import Report
from server.metrics import CONTENT_TYPE
from server.parts import Parts, parts_of

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether this process lives: 200 when it answers. The parts are as they were last seen; nothing is asked."""
    parts = parts_of(request)
    return {"status": "ok", "parts": _parts(parts, parts.health.last)}


@router.get("/ready", responses={503: {"description": "A part is not ready."}})
async def ready(request: Request) -> JSONResponse:
    """Whether requests can be answered as they should be: asks every part, 503 when one is not ready."""
    parts = parts_of(request)
    report = await parts.health.probe()
    content = {"status": "ready" if report.ready else "not_ready", "parts": _parts(parts, report)}
    return JSONResponse(content, status_code=200 if report.ready else 503)


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
        "redis": asdict(report.store) if report else {"status": "not_yet_seen"},
        "engines": [asdict(engine) for engine in report.engines] if report else [],
    }
