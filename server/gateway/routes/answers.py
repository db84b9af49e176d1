"""What clients get: the shapes of answers, in JSON and in chunks."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from server.engine_protocol import BASE_MODEL
from server.gateway.generation.generator import Answer
from server.gateway.generation.personalizer import Level, Personalization
from server.store.jobs import Job, JobState

_EXAMPLE: dict[str, Any] = {
    "id": "gen-1b0330fa255959863cff0464",
    "text": "up early, straight to the water",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 17, "completion_tokens": 9, "total_tokens": 26},
    "personalization": {
        "level": "merged",
        "recipe": "mta1:9f2c41d0:shared:c+a03*803+a17*197",
        "source": "topic",
        "anchors": [
            {"id": "a03", "weight": 0.803, "similarity": 0.9142},
            {"id": "a17", "weight": 0.197, "similarity": 0.2245},
        ],
        "reason": None,
        "timings_ms": {"profile": 0.3, "recipe": 0.1, "engine": 160.2, "total": 161.4},
    },
}


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str = Field(description="What was wrong, the offending value, what to do.")
    type: str
    param: str | None = Field(description="The field at fault, in dots, e.g. `items.3.text`.")
    code: str = Field(description="A short reason for programs.")


class ErrorAnswer(_Answer):
    """OpenAI's error shape: what every answer of status 4xx and 5xx is."""

    error: ErrorDetail


class AnchorAnswer(_Answer):
    """One anchor that speaks."""

    id: str = Field(examples=["a03"])
    weight: float = Field(description="Its weight in the recipe, 0 to 1.")
    similarity: float | None = Field(
        description="How near it is to the user's profile, -1 to 1; null when others are nearer by now."
    )
    gain: float | None = Field(
        None,
        description="By how many nats a token it is predicted to lower the loss of the user's own items; null where "
        "topics speak.",
    )


class WhoSpeaks(_Answer):
    """How far an answer is personal, and by whom."""

    level: Level
    recipe: str | None = Field(
        description="The fused adapter's name, without the user adapter that `stacked` adds; null for the base model."
    )
    source: str | None = Field(description="The evidence behind the weights; null for the base model.")
    anchors: list[AnchorAnswer] = Field(description="Nearest first.")
    reason: str | None = Field(description="Why the level is not higher, if there is something to say.")


class PersonalizationAnswer(WhoSpeaks):
    """The same, with where the milliseconds went."""

    timings_ms: dict[str, float] = Field(
        description="`profile`: store. `recipe`: index and weights. `history`: past items. `engine_ttft`: engine, "
        "until the first token that it streams. `engine`: engine in all. `total`: from the request's arrival."
    )


class Usage(_Answer):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateAnswer(_Answer):
    """The text and who speaks in it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: str
    text: str
    finish_reason: str
    usage: Usage
    personalization: PersonalizationAnswer


class ProfileAnswer(_Answer):
    """What a change made of the profile."""

    user_id: str
    received: int = Field(description="Items in the request.")
    kept: int = Field(description="Items in the profile now.")
    changed: int = Field(description="Items that came, went, or have new content; 0 for a repeated request.")
    recipe: str
    anchors: list[AnchorAnswer]


class AdapterAnswer(_Answer):
    """A user adapter."""

    id: str
    recipe: str = Field(description="The recipe that it was trained on, and is always served with.")
    bytes: int = Field(description="Size of what is kept.")
    created_at: str = Field(description="UTC, ISO 8601.")
    stale: bool = Field(description="Whether it is of another bank, and so not served.")


class UserAnswer(_Answer):
    """What is stored of a user and who speaks for them."""

    user_id: str
    items: int
    bytes: int = Field(description="Memory that the user takes in the store.")
    embedder: str
    updated_at: str = Field(description="UTC, ISO 8601.")
    recipe: str
    source: str
    anchors: list[AnchorAnswer]
    adapter: AdapterAnswer | None = Field(description="The user adapter; null without one.")


class JobAnswer(_Answer):
    """A job, as it is now."""

    id: str
    state: JobState = Field(description="The last five have ended for good. `rejected`: trained, but no better.")
    config: dict[str, Any]
    progress: dict[Literal["step", "of", "loss"], float | int | None] = Field(
        description="Steps of all training runs of the job, and the loss of the last, nats per output token."
    )
    held_out: dict[Literal["before", "after"], float | None] = Field(
        description="Loss on samples that were not trained on: of the fused adapter alone, and with the user adapter."
    )
    created_at: str
    started_at: str | None
    ended_at: str | None
    tries: int = Field(description="Workers that have taken it up.")
    adapter: str | None = Field(description="Id of the user adapter that it made.")
    error: str | None = Field(description="Why it failed, and what to do.")


class ErasedAnswer(_Answer):
    """What was erased."""

    user_id: str
    erased: dict[Literal["items", "samples", "jobs", "adapters", "keys"], int]
    log_rewritten_by: str = Field(description="By when the store's file on disk has forgotten it too. UTC, ISO 8601.")


def job_answer(job: Job) -> JobAnswer:
    """A job as clients see it."""
    return JobAnswer(
        id=str(job.id),
        state=job.state,
        config=orjson.loads(job.config),
        progress={"step": job.step, "of": job.of, "loss": job.loss},
        held_out={"before": job.before, "after": job.after},
        created_at=iso(job.created_ms),
        started_at=iso(job.started_ms) if job.started_ms else None,
        ended_at=iso(job.ended_ms) if job.ended_ms else None,
        tries=job.tries,
        adapter=job.adapter or None,
        error=job.error or None,
    )


def iso(unix_ms: int) -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")


def who_speaks(personalization: Personalization) -> dict[str, Any]:
    """The `personalization` block, timings aside."""
    return {
        "level": personalization.level.value,
        "recipe": personalization.shown,
        "source": personalization.source,
        "anchors": anchors(personalization),
        "reason": personalization.reason,
    }


def anchors(personalization: Personalization) -> list[dict[str, Any]]:
    """The anchors as clients see them."""
    return [
        {"id": share.id, "weight": share.weight, "similarity": share.similarity, "gain": share.gain}
        for share in personalization.anchors
    ]


def whole(answer: Answer, text: str) -> dict[str, Any]:
    """The JSON answer, once the text is complete."""
    return {
        "id": answer.id,
        "text": text,
        "finish_reason": answer.stream.finish_reason,
        "usage": answer.stream.usage,
        "personalization": who_speaks(answer.personalization) | {"timings_ms": answer.timings.ms},
    }


class Chunks:
    """The chunks of one stream, in OpenAI's shape."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._head = {
            "id": answer.id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": answer.personalization.shown or BASE_MODEL,
        }

    def first(self) -> dict[str, Any]:
        """Says who speaks, before the first text."""
        block = who_speaks(self._answer.personalization) | {"timings_ms": self._answer.timings.ms}
        return self._chunk({"role": "assistant", "content": ""}) | {"personalization": block}

    def text(self, text: str) -> dict[str, Any]:
        """A piece of text."""
        return self._chunk({"content": text})

    def last(self) -> dict[str, Any]:
        """Ends the answer: reason, usage, and all timings."""
        stream = self._answer.stream
        ending = {"usage": stream.usage, "timings_ms": self._answer.timings.ms}
        return self._chunk({}, stream.finish_reason) | ending

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return self._head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
