"""The console: `/console`, the files in `static/`, and `GET /bank`, which only they ask for."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

from adapters.recipe import PER_MILLE
from bank.lookup.serving import TOPIC_GRAIN
from bank.manifest import WeightRule
from server.gateway.parts import parts_of

router = APIRouter()

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

Place = tuple[float, float]


class RuleAnswer(BaseModel, frozen=True):
    """How what is known of a user becomes weights."""

    name: str = Field(description="`topic` or `posterior`.")
    says: str = Field(description="The same in words.")
    constants: dict[str, int | float]


class AnchorOnMap(BaseModel, frozen=True):
    """An anchor: nothing says who it is."""

    id: str = Field(examples=["a03"])
    items: int = Field(description="How many items it was trained on.")
    at: Place = Field(description="Where it lies on the map.")
    words: list[str] = Field(description="Typical words of its own, where the bank was built with `--describe`.")


class MapAnswer(BaseModel, frozen=True):
    """The map: the first two principal components of the anchors' embeddings."""

    explained: Place = Field(description="Which share of the embeddings' variance lies along each axis.")


class BankAnswer(BaseModel, frozen=True):
    """The bank that is served."""

    bank: str = Field(description="Its 8 hex digits, which recipes carry.")
    model: str
    embedder: str
    method: str
    rank: int
    serving_rank: int = Field(description="What the engine's slots are sized for.")
    rule: RuleAnswer
    common_row: bool = Field(description="Whether an adapter that all people share is part of every recipe.")
    anchors: list[AnchorOnMap]
    map: MapAnswer


@router.get("/bank", tags=["operations"])
async def read_bank(request: Request) -> BankAnswer:
    """The bank that is served: its anchors on a map, and the rule of their weights in words."""
    bank = parts_of(request).bank
    manifest, atlas = bank.manifest, bank.atlas
    places = [(float(x), float(y)) for x, y in atlas.anchors]
    return BankAnswer(
        bank=manifest.short,
        model=manifest.base_model.name,
        embedder=manifest.embedder.id,
        method=manifest.method.value,
        rank=manifest.rank,
        serving_rank=manifest.serving_rank,
        rule=rule_answer(manifest.weights),
        common_row=manifest.common,
        anchors=[
            AnchorOnMap(id=entry.id, items=entry.items, at=place, words=list(entry.words))
            for entry, place in zip(manifest.anchors, places, strict=True)
        ],
        map=MapAnswer(explained=(atlas.explained[0], atlas.explained[1])),
    )


def rule_answer(rule: WeightRule) -> RuleAnswer:
    """A rule in words, with its constants."""
    topic = (
        f"{rule.anchors} anchors whose topics are most similar to a user's speak, by similarity, in steps of "
        f"{TOPIC_GRAIN / PER_MILLE:g}; their weights sum to {rule.strength:g}."
    )
    if (posterior := rule.posterior) is None:
        constants = {"anchors": rule.anchors, "strength": rule.strength}
        return RuleAnswer(name="topic", says=f"The {topic}", constants=constants)
    return RuleAnswer(
        name="posterior",
        says="A user's own items say how far to step along each anchor's adapter from what all people share, in "
        f"either direction: the more they have written the further, halfway at about {posterior.decay:g} tokens. "
        f"At most {posterior.anchors} steps are taken, the longest. Until the items have been read, the {topic}",
        constants={
            "anchors": posterior.anchors,
            "decay": posterior.decay,
            "topic_anchors": rule.anchors,
            "topic_strength": rule.strength,
        },
    )


@router.get("/", include_in_schema=False)
async def root() -> Response:
    """Where a person who opens the server's address wants to be."""
    return RedirectResponse("/console")


@router.get("/console", include_in_schema=False)
@router.get("/console/", include_in_schema=False)
async def index(request: Request) -> Response:
    """The page."""
    return await file(request, "index.html")


@router.get("/console/{path:path}", include_in_schema=False)
async def file(request: Request, path: str) -> Response:
    """A file of the page's."""
    response = await _FILES.get_response(path, request.scope)
    if response.status_code == 200 and (kind := _TYPES.get(Path(path).suffix)):
        response.headers["Content-Type"] = kind
    response.headers.update(HEADERS)
    return response
