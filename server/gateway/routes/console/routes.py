"""The web console: `/console` with the files in `static/`, and `GET /bank`, which only the console uses."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

from adapters.recipe import PER_MILLE
from bank.items.tasks import Task
from bank.lookup.serving import TOPIC_GRAIN
from bank.manifest import BankManifest
from server.gateway.parts import call_of

router = APIRouter()

STATIC = Path(__file__).parent / "static"
_FILES = StaticFiles(directory=STATIC, check_dir=False)  # never leaves the folder, whatever the path
HEADERS = {
    # The page may load only its own files and call only its own server, so text from users cannot run scripts.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidate on every request
}

Point = tuple[float, float]


class RuleAnswer(BaseModel, frozen=True):
    """How a user's profile becomes anchor weights."""

    name: str = Field(description="`topic` or `posterior`.")
    says: str = Field(description="The rule in words.")
    constants: dict[str, int | float]


class TaskAnswer(BaseModel, frozen=True):
    """What the bank's people do."""

    name: str = Field(examples=["chat"])
    fields: tuple[str, ...] = Field(description="Fields of an item.")
    instruction: str = Field(description="What a turn begins with; empty where people write freely.")
    field: str | None = Field(description="The field of an item that ends a turn; null if the instruction is all.")

    @classmethod
    def of(cls, task: Task) -> Self:
        field = next((name for name in task.pair_fields if f"{{{name}}}" in task.input), None)
        return cls(name=task.name, fields=task.fields, instruction=task.instruction, field=field)


class AnchorOnMap(BaseModel, frozen=True):
    """An anchor, without its identity."""

    id: str = Field(examples=["a03"])
    items: int = Field(description="Number of items it was trained on.")
    at: Point = Field(description="Position on the map.")
    words: list[str] = Field(description="Words that the anchor makes likelier; empty where answers are labels.")


class MapAnswer(BaseModel, frozen=True):
    """The map: the first two principal components of the anchors' embeddings."""

    explained: Point = Field(description="Share of the embeddings' variance along each axis.")


class BankAnswer(BaseModel, frozen=True):
    task: TaskAnswer
    bank: str = Field(description="The bank's 8 hex digits, as in recipe names.")
    model: str
    embedder: str
    method: str
    rank: int
    serving_rank: int = Field(description="Rank that the engine's slots are sized for.")
    rule: RuleAnswer
    common_row: bool = Field(description="Whether every recipe contains an adapter shared by all users.")
    phrases: bool = Field(description="Whether answers can use what a user repeats in their own texts.")
    anchors: list[AnchorOnMap]
    map: MapAnswer


@router.get("/bank", tags=["operations"])
async def read_bank(request: Request) -> BankAnswer:
    """Return the served bank: its anchors on a map and the weight rule in words."""
    bank = call_of(request).parts.bank
    manifest, projection = bank.manifest, bank.projection
    return BankAnswer(
        task=TaskAnswer.of(bank.task),
        bank=manifest.short,
        model=manifest.base_model.name,
        embedder=manifest.embedder.id,
        method=manifest.method.value,
        rank=manifest.rank,
        serving_rank=manifest.serving_rank,
        rule=rule_answer(manifest),
        common_row=manifest.common,
        phrases=manifest.phrases is not None,
        anchors=[
            AnchorOnMap(id=entry.id, items=entry.items, at=place, words=list(entry.words))
            for entry, place in zip(manifest.anchors, projection.anchors.tolist(), strict=True)
        ],
        map=MapAnswer(explained=(projection.explained[0], projection.explained[1])),
    )


def rule_answer(manifest: BankManifest) -> RuleAnswer:
    rule = manifest.weights
    topic = (
        f"{rule.anchors} anchors most similar in topic to the user are merged, weighted by similarity in steps of "
        f"{TOPIC_GRAIN / PER_MILLE:g}; their weights sum to {rule.strength:g}."
    )
    if (posterior := rule.posterior) is None:
        constants = {"anchors": rule.anchors, "strength": rule.strength}
        return RuleAnswer(name="topic", says=f"The {topic}", constants=constants)
    along = (
        f"{manifest.directions} mixtures of the anchors' adapters" if manifest.directions else "each anchor's adapter"
    )
    return RuleAnswer(
        name="posterior",
        says=f"The user's own items determine how far to move from the common row along {along}, in either direction. "
        f"More text moves further: half of the full distance at about {posterior.decay:.4g} tokens. "
        f"Until the items have been read, the {topic}",
        constants={
            "directions" if manifest.directions else "anchors": manifest.personal_rows,
            "decay": float(f"{posterior.decay:.4g}"),
            "topic_anchors": rule.anchors,
            "topic_strength": rule.strength,
        },
    )


@router.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/console")


@router.get("/console/{path:path}", include_in_schema=False)
@router.get("/console", include_in_schema=False)
async def file(request: Request) -> Response:
    """Serve the page or one of its files."""
    path = request.path_params.get("path") or "index.html"
    response = await _FILES.get_response(path, request.scope)
    if response.status_code == 200 and path.endswith(".js"):  # Python's own table has an outdated type for these
        response.headers["Content-Type"] = "text/javascript; charset=utf-8"
    response.headers.update(HEADERS)
    return response
