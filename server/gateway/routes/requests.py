"""What clients send. Strict: no value is converted to another type, no unknown field is accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import Header, Path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.gateway.generation.request import Personalize
from server.gateway.http.errors import AS_MESSAGES, AS_TEXT
from server.store.samples import MAX_SAMPLES
from server.store.tenants.user_key import check_user_id

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_HISTORY = 16
AUTO = "auto"
SEED_MAX = (1 << 63) - 1
MAX_MESSAGES = 1024
MAX_ITEMS = 10_000
MAX_USER_RANK = 8
MAX_STEPS = 500

_USER_ID = (
    "1 to 256 bytes of printable UTF-8 without spaces, `/`, `\\`, `{` or `}`; not `.` or `..`. Compared in Unicode "
    "normal form C."
)
_USER_ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": r"^[^\s/\\{}]+$"}
UserId = Annotated[str, AfterValidator(check_user_id), WithJsonSchema(_USER_ID_SCHEMA | {"description": _USER_ID})]
UserIdInPath = Annotated[UserId, Path(description=_USER_ID, examples=["ada"])]

Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(min_length=1, max_length=MAX_STOPS),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


def _history(value: Any) -> int | Literal["auto"]:
    if value == AUTO or (type(value) is int and 0 <= value <= MAX_HISTORY):
        return value  # type: ignore[no-any-return]
    raise PydanticCustomError("history", f"must be a whole number from 0 to {MAX_HISTORY}, or {AUTO}")


_HISTORY = (
    "How many of the user's most relevant past items go into the prompt; fewer if it has no room, none if they cannot "
    "be read in time. `auto`: as many as were found to help when the bank was built."
)
_HISTORY_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_HISTORY}, {"const": AUTO}]}
History = Annotated[
    int | Literal["auto"], PlainValidator(_history), WithJsonSchema(_HISTORY_SCHEMA | {"description": _HISTORY})
]


def items_wanted(history: int | Literal["auto"], usual: int) -> int:
    """How many past items are asked for, where `auto` stands for `usual`."""
    return usual if isinstance(history, str) else history


Wanted = Annotated[
    Personalize,
    Field(
        strict=False,  # enum values arrive as JSON strings
        description="`auto`: all that is known about the user. `merged`: a recipe or an error. `none`: the base model.",
    ),
]
Strength = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        multiple_of=0.05,
        description="Factor on the anchors' weights beside the common row, which alone speaks at 0; in steps of 0.05. "
        "Below 1 a user's own adapter is left out.",
    ),
]


QueueTimeout = Annotated[
    float | None,
    Header(
        alias="X-Queue-Timeout",
        ge=0,
        allow_inf_nan=False,
        description="Most seconds that the request may wait for a place in the engines, if that is less than usual. At "
        "most half of them it waits for past items, while those of others are read.",
    ),
]


class Strict(BaseModel):
    """No value is converted to another type, no unknown field is accepted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class GenerateRequest(Strict):
    """A generation for one user: a prompt, or a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "ada", "prompt": "What should I do this weekend?", "max_tokens": 64},
                {
                    "user_id": "ada",
                    "messages": [{"role": "user", "content": "Write a headline for an article on tides."}],
                    "temperature": 0,
                    "stream": True,
                },
            ]
        }
    )

    user_id: UserId
    prompt: str | None = Field(
        None, min_length=1, description="One complete user turn; the server applies the model's chat template."
    )
    messages: list[Message] | None = Field(
        None, fail_fast=True, min_length=1, max_length=MAX_MESSAGES, description="A conversation, instead of a prompt."
    )
    max_tokens: int = Field(
        128, ge=1, description="Most tokens of the answer; refused if the context has no room for them."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the probability to sample from.")
    stop: Stops | None = Field(None, description="Texts that end the answer; a single string is accepted.")
    seed: int | None = Field(None, ge=-SEED_MAX - 1, le=SEED_MAX, description="Makes sampling repeatable.")
    stream: bool = Field(False, description="Server-sent events in the shape of OpenAI's chunks.")
    history: History = "auto"
    personalize: Wanted = Personalize.AUTO
    strength: Strength = 1.0

    @model_validator(mode="after")
    def _one_conversation(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            fault = "give prompt or messages, not both" if self.prompt else "give prompt or messages"
            raise PydanticCustomError("one_of", fault, {"param": "prompt"})
        return self

    @property
    def conversation_param(self) -> str:
        """The field that holds the conversation."""
        return "prompt" if self.messages is None else "messages"


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


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must hold more than white space")
    return text


def _users_turn(conversation: str | list[Message]) -> str | list[Message]:
    last = Message(role="user", content=conversation) if isinstance(conversation, str) else conversation[-1]
    _not_blank(last.content)
    if last.role != "user":
        raise PydanticCustomError("turn", f"must end with the user's turn, it ends with {last.role!r}")
    return conversation


class SampleRequest(Strict):
    """One example of how the user wants to be answered."""

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag(AS_TEXT)]
        | Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), Tag(AS_MESSAGES)],
        Discriminator(lambda value: AS_MESSAGES if isinstance(value, list) else AS_TEXT),
        AfterValidator(_users_turn),
    ] = Field(description="One user turn, or a conversation that ends with one.")
    output: Annotated[str, Field(min_length=1), AfterValidator(_not_blank)] = Field(
        description="What the answer should have been."
    )


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
