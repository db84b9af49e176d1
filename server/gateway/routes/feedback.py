"""`POST /users/{user_id}/feedback`: what a person did with an answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from server.gateway.experiments.arms import Arm, Level
from server.gateway.generation.answer_ids import read_answer_id
from server.gateway.learning.feedback import Final
from server.gateway.parts import call_of
from server.gateway.routes.requests import (
    SampleInput,
    SampleOutput,
    Strict,
    UserIdInPath,
    UserRoute,
    epoch_of,
    sample_messages,
    with_examples,
)
from server.settings import MAX_ITEM_BYTES
from server.store.feedback import Feedback, Outcome, Rating
from server.store.samples import Sample


class FeedbackRequest(Strict):
    """What a person did with an answer; at least one of `outcome`, `rating` and `final`."""

    model_config = with_examples(
        {"answer": "gen-1b0330fa255959863cff0464.B5zPAuOwxELjsMRCmPw8nekiCZYPioQEaDRfC38_", "outcome": "sent"},
        {
            "answer": "gen-1b0330fa255959863cff0464.B5zPAuOwxELjsMRCmPw8nekiCZYPioQEaDRfC38_",
            "input": "Any plans?",
            "text": "I have no plans yet.",
            "final": "The sea. Always the sea.",
        },
    )

    answer: str = Field(max_length=128, description="The `id` of the answer, for 7 days.")
    outcome: Outcome | None = Field(
        None, strict=False, description="By default `edited` if `final` differs from the answer, `sent` if it does not."
    )
    rating: Rating | None = Field(None, strict=False)
    final: SampleOutput | None = Field(
        None, max_length=MAX_ITEM_BYTES, description="The text that the person really sent; it needs `input`."
    )
    input: SampleInput | None = Field(None, description="What `final` answers: a user turn, or a conversation.")
    text: str | None = Field(
        None, max_length=MAX_ITEM_BYTES, description="The answer, to measure how much of it was changed."
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="The answer's SHA-256 in hex, instead of `text`."
    )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.outcome is None and self.rating is None and self.final is None:
            raise PydanticCustomError("combination", "set outcome, rating or final", {"param": "outcome"})
        if self.final is None and any(part is not None for part in (self.input, self.text, self.sha256)):
            raise PydanticCustomError("combination", "input, text and sha256 require final", {"param": "final"})
        if self.final is not None and self.input is None:
            raise PydanticCustomError("combination", "final requires input: what it answers", {"param": "input"})
        if self.final is not None and (self.text is None) == (self.sha256 is None):
            message = "final requires text or sha256 of the answer, not both, to tell whether it was changed"
            raise PydanticCustomError("combination", message, {"param": "text"})
        return self


class FeedbackAnswer(BaseModel, frozen=True):
    """All that is known about the answer by now."""

    answer: str
    level: Level = Field(description="Level of the answer.")
    arm: Arm = Field(description="Arm that the user was in (`MTA_HOLDOUT`).")
    outcome: Outcome | None
    rating: Rating | None
    changed: float | None = Field(
        description="Share of the answer that the person changed, 0 to 1: the edit distance over the longer text's "
        "length; null if unknown."
    )
    job: str | None = Field(description="Id of the training job that this text brought (`MTA_REFRESH_SAMPLES`).")
    learned: bool = Field(
        description="Whether `final` teaches: as an item of the history, and as a sample if texts are kept."
    )


router = APIRouter(route_class=UserRoute, prefix="/users/{user_id}", tags=["learn"])


@router.post("/feedback")
async def give_feedback(request: Request, user_id: UserIdInPath, body: FeedbackRequest) -> FeedbackAnswer:
    """Say what the person did with an answer; the server learns from a text that they sent instead.

    `answer` names an answer to this user. Feedback can come in several parts, such as a rating first and the text
    later; a repeated request changes nothing. A `final` that differs from the answer becomes an item of the user's
    history and a sample for the next training, beside those sent to `adapt`.
    """
    call, epoch = call_of(request), epoch_of(request)
    parts, user = call.parts, call.user(user_id)
    note = read_answer_id(call.users, user, epoch, body.answer)
    final = None
    if body.final is not None and body.input is not None:
        task = parts.bank.task
        given = body.text if task.drafted and body.text else body.input  # what was changed is the nearest draft
        final = Final(Sample(sample_messages(given, task), body.final), body.text, body.sha256)
    said = Feedback(note.level.value, note.arm.value, body.outcome, body.rating, None)
    known, learned, job = await parts.feedbacks.give(user, note, said, final, epoch, caller=call.caller)
    return FeedbackAnswer(answer=body.answer, learned=learned, job=str(job.id) if job else None, **asdict(known))
