"""`/console`: the files in `static/`, which are the whole of the browser's side."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"
_FILES = StaticFiles(directory=STATIC, check_dir=False)
"""Serves nothing outside the folder, whatever the path; knows entity tags and ranges."""

HEADERS = {
    # The page may load its own files and call its own server: whatever text of a user's it shows, nothing else runs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask each time whether it has changed
}

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Others are guessed from tables of the system, which images may lack."""


@router.get("/")
async def root() -> Response:
    """Where a person who opens the server's address wants to be."""
    return RedirectResponse("/console")


@router.get("/console")
@router.get("/console/")
async def index(request: Request) -> Response:
    """The page."""
    return await _file(request, "index.html")


@router.get("/console/{path:path}")
async def file(request: Request, path: str) -> Response:
    """A file of the page's."""
    return await _file(request, path)


async def _file(request: Request, path: str) -> Response:
    response = await _FILES.get_response(path, request.scope)
    if response.status_code == 200 and (kind := _TYPES.get(Path(path).suffix)):
        response.headers["Content-Type"] = kind
    response.headers.update(HEADERS)
    return response
