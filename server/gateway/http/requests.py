"""What clients send. Strict: no value is converted to another type, no unknown field is accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from server.store.samples import MAX_SAMPLES
from server.store.tenants.user_key import check_user_id

MAX_MESSAGES = 1024
MAX_ITEMS = 10_000
AS_TEXT, AS_MESSAGES = "as text", "as messages"
"""The two forms of an `input`; pydantic writes them into the locations of errors."""
MAX_USER_RANK = 8
MAX_STEPS = 500

_USER_ID = (
    "1 to 256 bytes of printable UTF-8 without spaces, `/`, `\\`, `{` or `}`; not `.` or `..`. Compared in Unicode "
    "normal form C."
)
_USER_ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": r"^[^\s/\\{}]+$"}
UserId = Annotated[str, AfterValidator(check_user_id), WithJsonSchema(_USER_ID_SCHEMA | {"description": _USER_ID})]
UserIdInPath = Annotated[UserId, Path(description=_USER_ID, examples=["ada"])]


class Strict(BaseModel):
    """No value is converted to another type, no unknown field is accepted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class ItemsRequest(Strict):
    """Items of a user's history, oldest first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"items": [{"text": "Up at five for the waves again."}, {"text": "Wax on, wetsuit on, gone."}]},
                {"items": [{"id": "n1", "input": "Any plans?", "output": "The sea. Always the sea."}]},
            ]
        }
    )

    items: list[dict[str, Any]] = Field(
        fail_fast=True,  # four million wrong items would be four million errors
        min_length=1,
        max_length=MAX_ITEMS,
        description="Items of the bank's task, `{input, output}` pairs, or plain `{text}`. Without an `id` the hash of "
        "the content is used. Fields that the task does not use are ignored.",
    )


class SampleRequest(Strict):
    """One example of how the user wants to be answered."""

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag(AS_TEXT)]
        | Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), Tag(AS_MESSAGES)],
        Discriminator(lambda value: AS_MESSAGES if isinstance(value, list) else AS_TEXT),
    ] = Field(description="One user turn, or a conversation that ends with one.")
    output: str = Field(min_length=1, description="What the answer should have been.")


class AdaptOptions(Strict):
    """How to train; the server chooses what is not given."""

    rank: int | None = Field(
        None, ge=1, le=MAX_USER_RANK, description="Rank of the user's LoRA, within what the bank leaves for users."
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Most optimiser steps of one run.")
    learning_rate: float | None = Field(None, gt=0, le=1)
    holdout: float | None = Field(
        None, ge=0.05, le=0.5, description="Share of the samples held out, if there are many."
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the anchors beneath, relative to the merged adapter: 1 trains on top of that, 0 on what "
        "all users share. By default 0.5; 1 if the bank has no common row.",
    )


class AdaptRequest(Strict):
    """Samples to adapt to."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "samples": [
                        {"input": "Any plans?", "output": "The sea. Always the sea."},
                        {"input": "How was your day?", "output": "Salty. Glorious."},
                    ]
                }
            ]
        }
    )

    samples: list[SampleRequest] = Field(fail_fast=True, min_length=1, max_length=MAX_SAMPLES)
    config: AdaptOptions = AdaptOptions()
    append: bool = Field(False, description="Add to the kept samples instead of replacing them.")
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=128, description="The same key again gives the same job."
    )
