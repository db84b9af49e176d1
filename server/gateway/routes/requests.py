"""What clients send. Strict: no value is converted to another type, no unknown field is accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import Header, Path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.gateway.generation.request import Personalize
from server.store.tenants.user_key import check_user_id

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_HISTORY = 16
AUTO = "auto"
SEED_MAX = (1 << 63) - 1
MAX_MESSAGES = 1024

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
