"""The shapes of JSON answers, and how they are made from what the gateway knows."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Self

import orjson
from pydantic import BaseModel, Field

from adapters.recipe import PER_MILLE, FusionRecipe, anchor_id
from bank.lookup.serving import AnchorWeight
from server.gateway.generation.generator import Answer
from server.gateway.generation.personalizer import Level
from server.store.jobs import Job, JobState
from server.store.profiles import Erased


class AnchorAnswer(BaseModel, frozen=True):
    """One anchor that speaks for the user."""

    id: str = Field(examples=["a03"])
    weight: float = Field(description="Its weight in the recipe; negative where the recipe steps away from it.")
    similarity: float | None = Field(
        description="How near it is to the user's profile, -1 to 1; null if others are nearer by now."
    )
    gain: float | None = Field(
        description="Predicted reduction of the loss on the user's own items, nats per token; null where the weights "
        "come from topics."
    )


class PersonalizationAnswer(BaseModel, frozen=True):
    """How personal an answer is, which anchors speak in it, and where the milliseconds went."""

    level: Level
    recipe: str | None = Field(
        description="The fused adapter's name, without the user adapter that `stacked` adds; null for the base model."
    )
    source: str | None = Field(description="The evidence behind the weights; null for the base model.")
    anchors: list[AnchorAnswer] = Field(description="Largest weight first.")
    history: int = Field(description="How many of the user's past items are in the prompt.")
    reason: str | None = Field(description="Why the level is not higher, if there is a reason to give.")
    timings_ms: dict[str, float] = Field(
        description="`profile`: store. `recipe`: index and weights. `history`: past items. `engine_ttft`: engine, "
        "until the first token that it streams. `engine`: engine in total. `total`: from the request's arrival."
    )
    history_reason: str | None = Field(
        description="Why no past items are in the prompt although some were wanted, if they could not be read in time."
    )

    @classmethod
    def of(cls, answer: Answer) -> Self:
        """What is known of an answer so far."""
        who = answer.personalization
        return cls(
            level=who.level,
            recipe=who.shown,
            source=who.source,
            anchors=anchors(who.recipe, who.weights) if who.recipe else [],
            history=answer.prompt.items,
            history_reason=answer.prompt.reason,
            reason=who.reason,
            timings_ms=answer.timings.ms,
        )


class Usage(BaseModel, frozen=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, answer: Answer) -> Self | None:
        """Of a complete answer."""
        return cls(**answer.stream.usage) if answer.stream.usage else None


class GenerateAnswer(BaseModel, frozen=True):
    """The text and who speaks in it."""

    id: str
    text: str
    finish_reason: str
    usage: Usage | None = Field(description="Null if the engine does not report it.")
    personalization: PersonalizationAnswer


class ProfileAnswer(BaseModel, frozen=True):
    """The result of a profile change."""

    user_id: str
    received: int = Field(description="Items in the request.")
    kept: int = Field(description="Items in the profile now.")
    changed: int = Field(description="Items added, removed, or with new content; 0 for a repeated request.")
    recipe: str
    anchors: list[AnchorAnswer]


class AdapterAnswer(BaseModel, frozen=True):
    """A user adapter."""

    id: str
    recipe: str = Field(description="The recipe that it was trained on, and is always served with.")
    bytes: int = Field(description="Stored size.")
    created_at: str = Field(description="UTC, ISO 8601.")
    stale: bool = Field(description="Whether it belongs to another bank, and so is not served.")


class UserAnswer(BaseModel, frozen=True):
    """What is stored about a user, and which anchors speak for them."""

    user_id: str
    items: int
    bytes: int = Field(description="Memory that the profile and its items take in the store.")
    embedder: str
    updated_at: str = Field(description="UTC, ISO 8601.")
    recipe: str
    source: str
    anchors: list[AnchorAnswer]
    at: tuple[float, float] = Field(description="Where they lie on the bank's map (`GET /bank`).")
    adapter: AdapterAnswer | None = Field(description="The user adapter; null without one.")


class JobProgress(BaseModel, frozen=True):
    """A job's progress, over all its training runs. Losses are in nats per output token."""

    step: int
    steps: int = Field(description="As far as known: a run ends early once nothing more is learnt.")
    phase: str = Field(description="What is being done, in a few words.", examples=["fold 1 of 2"])
    loss: list[tuple[int, float]] = Field(
        description="Step and loss of its samples. Of many steps a part, and always the last; at most 200."
    )
    held_out: list[tuple[int, float]] = Field(
        description="Step and loss of samples that are not trained on, where it was taken. Each run starts afresh."
    )


class HeldOut(BaseModel, frozen=True):
    """Loss on samples that were not trained on, nats per output token; null until it is known."""

    before: float | None = Field(description="Of the fused adapter alone.")
    after: float | None = Field(description="With the user adapter.")


class JobAnswer(BaseModel, frozen=True):
    """A job's current state."""

    id: str
    state: JobState = Field(description="All but the first two are final. `rejected`: trained, but no better.")
    config: dict[str, Any]
    progress: JobProgress
    held_out: HeldOut
    created_at: str
    started_at: str | None
    ended_at: str | None
    tries: int = Field(description="How often a worker has taken it.")
    adapter: str | None = Field(description="Id of the user adapter that it made.")
    error: str | None = Field(description="Why it failed, and what to do.")

    @classmethod
    def of(cls, job: Job) -> Self:
        """A job as clients see it."""
        return cls(
            id=str(job.id),
            state=job.state,
            config=orjson.loads(job.config),
            progress=JobProgress(
                step=job.step,
                steps=job.of,
                phase=job.curve.phase or ("preparing" if job.state is JobState.RUNNING else job.state.value),
                loss=list(job.curve.loss),
                held_out=list(job.curve.held_out),
            ),
            held_out=HeldOut(before=job.before, after=job.after),
            created_at=iso(job.created_ms),
            started_at=iso(job.started_ms) if job.started_ms else None,
            ended_at=iso(job.ended_ms) if job.ended_ms else None,
            tries=job.tries,
            adapter=job.adapter or None,
            error=job.error or None,
        )


class ErasedAnswer(BaseModel, frozen=True):
    """What was erased."""

    user_id: str
    erased: Erased
    log_rewritten_by: str = Field(description="By when it is gone from the store's file on disk too. UTC, ISO 8601.")


def iso(unix_ms: int) -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")


def anchors(recipe: FusionRecipe, weights: Iterable[AnchorWeight]) -> list[AnchorAnswer]:
    """The anchors of a recipe, largest weight first, with what the user's profile says of them today."""
    today, answers = {weight.anchor: weight for weight in weights}, []
    for term in recipe.terms:
        now = today.get(term.anchor)
        answers.append(
            AnchorAnswer(
                id=anchor_id(term.anchor),
                weight=term.weight / PER_MILLE,
                similarity=round(now.similarity, 4) if now else None,
                gain=round(now.gain, 4) if now and now.gain is not None else None,
            )
        )
    return sorted(answers, key=lambda answer: (-abs(answer.weight), answer.id))
