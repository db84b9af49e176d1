"""`GET /bank`: what the bank is, where its anchors lie, and how they come to speak."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from adapters.recipe import PER_MILLE
from bank.lookup.serving import ServingBank
from bank.lookup.weights import TOPIC_GRAIN
from bank.rules import WeightRule
from server.gateway.parts import parts_of

router = APIRouter(tags=["operations"])

Place = tuple[float, float]

_MEANWHILE = "Until the items have been read, the"


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


@router.get("/bank")
async def read_bank(request: Request) -> BankAnswer:
    """The bank that is served: its anchors on a map, and the rule of their weights in words."""
    return bank_answer(parts_of(request).bank)


def bank_answer(bank: ServingBank) -> BankAnswer:
    """A bank as clients see it."""
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
    if posterior := rule.posterior:
        return RuleAnswer(
            name="posterior",
            says="A user's own items say how far to step along each anchor's adapter from what all people share, in "
            f"either direction: the more they have written the further, halfway at about {posterior.decay:g} tokens. "
            f"At most {posterior.anchors} steps are taken, the longest. {_topic(rule, _MEANWHILE)}",
            constants={"anchors": posterior.anchors, "decay": posterior.decay} | _of_topic(rule),
        )
    return RuleAnswer(name="topic", says=_topic(rule), constants={"anchors": rule.anchors, "strength": rule.strength})


def _topic(rule: WeightRule, the: str = "The") -> str:
    return (
        f"{the} {rule.anchors} anchors whose topics are most similar to a user's speak, by similarity, in steps of "
        f"{TOPIC_GRAIN / PER_MILLE:g}; their weights sum to {rule.strength:g}."
    )


def _of_topic(rule: WeightRule) -> dict[str, int | float]:
    return {"topic_anchors": rule.anchors, "topic_strength": rule.strength}
