"""Request bodies and parameters. Strict: values are not converted to other types, unknown fields are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import Header, Path, Request
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

from bank.items.prompt import chat_messages
from bank.items.tasks import Task
from server.gateway.generation.request import Personalize
from server.gateway.http.bodies import JsonRoute
from server.gateway.http.errors import AS_MESSAGES, AS_TEXT
from server.gateway.parts import call_of
from server.settings import MAX_INT32, Sampling
from server.store.samples import MAX_SAMPLES
from server.store.tenants.user_key import check_user_id

MAX_HISTORY = 16
SEED_MAX = (1 << 63) - 1
MAX_MESSAGES = 1024

_USER_ID = (
    "1 to 256 bytes of printable UTF-8 without spaces, `/`, `\\`, `{` or `}`; not `.` or `..`. Compared in Unicode "
    "normal form C."
)
_USER_ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": r"^[^\s/\\{}]+$"}
UserId = Annotated[str, AfterValidator(check_user_id), WithJsonSchema(_USER_ID_SCHEMA | {"description": _USER_ID})]
UserIdInPath = Annotated[UserId, Path(description=_USER_ID, examples=["ada"])]

_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_StopList = Annotated[list[_Stop], Field(min_length=1, max_length=4)]
Stops = Annotated[
    _StopList,
    BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=_Stop | _StopList
    ),
]


def _history(value: Any) -> int | Literal["auto"]:
    if value == "auto" or (type(value) is int and 0 <= value <= MAX_HISTORY):
        return value  # type: ignore[no-any-return]
    raise PydanticCustomError("history", f"must be a whole number from 0 to {MAX_HISTORY}, or auto")


_HISTORY = {
    "anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_HISTORY}, {"const": "auto"}],
    "description": "Number of the user's most relevant past items to put into the prompt; fewer if they do not fit, "
    "none if they cannot be read in time. `auto`: the number found to help when the bank was built.",
}
History = Annotated[int | Literal["auto"], PlainValidator(_history), WithJsonSchema(_HISTORY)]


def _words(value: Any) -> bool | Literal["auto"]:
    if value == "auto" or isinstance(value, bool):
        return value  # type: ignore[no-any-return]
    raise PydanticCustomError("words", "must be true, false or auto")


_WORDS = {
    "anyOf": [{"type": "boolean"}, {"const": "auto"}],
    "description": "Whether what the user repeats in their own texts (greetings, sign-offs, set phrases) is made "
    "likelier. `auto`: if that was found to help when the bank was built. Continued prompts are left alone.",
}
Words = Annotated[bool | Literal["auto"], PlainValidator(_words), WithJsonSchema(_WORDS)]

QueueTimeout = Annotated[
    float | None,
    Header(
        alias="X-Queue-Timeout",
        ge=0,
        allow_inf_nan=False,
        description="Longest wait for a place in the engines, in seconds, if shorter than the default. At most half "
        "of it is spent waiting for past items while those of other users are read.",
    ),
]


class UserRoute(JsonRoute):
    """A route that writes its body to a user, unless the user is erased while the body arrives."""

    async def before_body(self, request: Request) -> None:
        try:
            user_id = check_user_id(request.path_params["user_id"])
        except ValueError:
            return  # the handler refuses it
        call = call_of(request)
        request.state.epoch = await call.parts.profiles.rotation.begin_write(call.user(user_id))


class UserSamplesRoute(UserRoute):
    lines = "samples"
    max_lines = MAX_SAMPLES


def epoch_of(request: Request) -> str:
    """Return the epoch that the user of a `UserRoute` had when the request was accepted."""
    epoch: str = request.state.epoch
    return epoch


class Strict(BaseModel):
    """A body whose values are not converted to other types and whose unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def with_examples(*bodies: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


def check_not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must contain more than white space")
    return text


def _ends_with_user_turn(conversation: str | list[Message]) -> str | list[Message]:
    last = Message(role="user", content=conversation) if isinstance(conversation, str) else conversation[-1]
    check_not_blank(last.content)
    if last.role != "user":
        raise PydanticCustomError("turn", f"must end with a user turn, but ends with {last.role!r}")
    return conversation


SampleInput = Annotated[
    Annotated[str, Field(min_length=1), Tag(AS_TEXT)]
    | Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), Tag(AS_MESSAGES)],
    Discriminator(lambda value: AS_MESSAGES if isinstance(value, list) else AS_TEXT),
    AfterValidator(_ends_with_user_turn),
]
SampleOutput = Annotated[str, Field(min_length=1), AfterValidator(check_not_blank)]


def sample_messages(turns: str | Sequence[Message], task: Task) -> list[dict[str, str]]:
    return chat_messages(task.turn(turns)) if isinstance(turns, str) else [message.model_dump() for message in turns]


class PersonalRequest(Sampling, Strict):
    """What requests for an answer share. Null means that a field is not set: then the server's defaults apply.

    They are `MTA_DEFAULT_MAX_TOKENS` and, field by field, the engines' sampling (`MTA_DEFAULT_SAMPLING`).
    """

    seed: int | None = Field(None, ge=-SEED_MAX - 1, le=SEED_MAX, description="Makes sampling repeatable.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    personalize: Personalize = Field(
        Personalize.AUTO,
        strict=False,  # enum values arrive as JSON strings
        description="`auto`: as personal as possible. `merged`: the merged recipe or an error. `none`: the base model.",
    )
    strength: float = Field(
        1.0,
        ge=0,
        le=1,
        multiple_of=0.05,
        description="Factor on the anchor weights, in steps of 0.05; at 0 only the common row is used. Below 1 the "
        "user's own adapter is left out.",
    )
    words: Words = "auto"
    learn: bool | None = Field(
        None,
        description="Whether the last user message becomes an item of the user's history, unless it is short, code or "
        "quoted. Default: as the API key says (`mta keys create --learn`).",
    )


class AnswerRequest(PersonalRequest):
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_INT32, description="Maximum length of the answer in tokens; refused beyond the context."
    )
    stop: Stops | None = Field(None, description="Texts that end the answer; a single string is accepted.")


class UserRequest(AnswerRequest):
    user_id: UserId
    history: History = "auto"

    @property
    def prompt_param(self) -> str:
        """The field with the prompt, for error messages."""
        return "prompt"


class GenerateRequest(UserRequest):
    """A generation for one user, from a prompt or a conversation."""

    model_config = with_examples(
        {"user_id": "ada", "prompt": "What should I do this weekend?", "max_tokens": 64},
        {
            "user_id": "ada",
            "messages": [{"role": "user", "content": "Write a headline for an article on tides."}],
            "temperature": 0,
            "stream": True,
        },
    )

    prompt: str | None = Field(
        None, min_length=1, description="One complete user turn; the server applies the model's chat template."
    )
    messages: list[Message] | None = Field(
        None, fail_fast=True, min_length=1, max_length=MAX_MESSAGES, description="A conversation, instead of a prompt."
    )

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            message = "set prompt or messages, not both" if self.prompt else "set prompt or messages"
            raise PydanticCustomError("combination", message, {"param": "prompt"})
        return self

    @property
    def turns(self) -> list[dict[str, str]]:
        return chat_messages(self.prompt) if self.prompt else [each.model_dump() for each in self.messages or ()]

    @property
    def prompt_param(self) -> str:
        return "prompt" if self.messages is None else "messages"
