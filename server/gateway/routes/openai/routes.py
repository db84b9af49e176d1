"""`POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`, `GET /v1/models/{model}`.

Answers are what the engine says, under public names, and beside it who spoke.
"""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Header, Path, Request, Response
from pydantic import BaseModel, Field

from adapters.errors import excerpt
from server.engine_protocol import BASE_MODEL
from server.errors import InvalidRequest, NotFound
from server.gateway.access.keys import caller_of
from server.gateway.generation.generator import Answer
from server.gateway.generation.request import GenerationRequest, Personalize
from server.gateway.http.bodies import JsonRoute
from server.gateway.http.errors import ErrorAnswer
from server.gateway.http.streaming import event
from server.gateway.parts import Parts, parts_of, users_of
from server.gateway.routes.answering import AnswerResponse, PersonalizationAnswer
from server.gateway.routes.openai.requests import (
    PERSONAL_MODEL,
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
    StreamOptions,
)
from server.gateway.routes.requests import QueueTimeout, items_wanted
from server.store.tenants.user_key import check_user_id

_MODELS = (PERSONAL_MODEL, BASE_MODEL)
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    "4XX": {"model": ErrorAnswer},
    "5XX": {"model": ErrorAnswer},
}
_INTERNAL = ("kv_transfer_params", "ec_transfer_params")  # what engines tell each other
_NULLABLE = {"content", "refusal", "logprobs", "finish_reason", "usage"}
"""What may be null in OpenAI's schema; any other null field is left out."""
_PIECEWISE = frozenset(("index", "delta", "text", "logprobs"))


class _Completion(BaseModel, frozen=True):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As the request named it.")
    usage: dict[str, Any]
    personalization: PersonalizationAnswer = Field(description="Who spoke: beside OpenAI's own fields.")


class ChatCompletion(_Completion, frozen=True):
    """An answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[dict[str, Any]] = Field(
        description="OpenAI's: `index`, `message`, `finish_reason`, `logprobs`; of a stream `delta` for `message`."
    )


class TextCompletion(_Completion, frozen=True):
    """A continuation of a prompt."""

    object: Literal["text_completion"]
    choices: list[dict[str, Any]] = Field(description="OpenAI's: `index`, `text`, `finish_reason`, `logprobs`.")


class ModelAnswer(BaseModel, frozen=True):
    """A name that requests can call for."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(0, description="Not known.")
    owned_by: str = "mta"


class ModelsAnswer(BaseModel, frozen=True):
    """All names; recipes are none of them."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


UserHeader = Annotated[str | None, Header(alias="X-User-ID", description="Who asks; instead of the field `user`.")]
router = APIRouter(route_class=JsonRoute, prefix="/v1", tags=["openai"])


@router.post("/chat/completions", response_model=ChatCompletion, responses=_RESPONSES)
async def chat_completions(
    request: Request, body: ChatRequest, x_user_id: UserHeader = None, x_queue_timeout: QueueTimeout = None
) -> Response:
    """Answer a conversation in the user's own manner, in OpenAI's shape.

    Without a user, and with the model `base`, the base model answers. `personalization` beside the answer, in a stream
    beside the first chunk, and the headers X-MTA-Level and X-MTA-Recipe say who spoke. `store`, `metadata` and
    `service_tier` are ignored; what steers the engine is refused. Without `max_tokens` an answer may be as long as the
    context allows.
    """
    return _answer(request, body, x_user_id, x_queue_timeout)


@router.post("/completions", response_model=TextCompletion, responses=_RESPONSES)
async def completions(
    request: Request, body: CompletionRequest, x_user_id: UserHeader = None, x_queue_timeout: QueueTimeout = None
) -> Response:
    """Continue a prompt as it is, in the user's own manner, in OpenAI's shape: no chat template, and no history.

    Everything else is as for chat completions.
    """
    return _answer(request, body, x_user_id, x_queue_timeout)


@router.get("/models")
async def models() -> ModelsAnswer:
    """The models that requests can name."""
    return ModelsAnswer(data=[ModelAnswer(id=name) for name in _MODELS])


@router.get("/models/{model:path}", responses={"4XX": {"model": ErrorAnswer}})
async def model(model: Annotated[str, Path(description="Its name.", examples=[PERSONAL_MODEL])]) -> ModelAnswer:
    """One of them."""
    return ModelAnswer(id=_known(model))


def _answer(
    request: Request, body: ChatRequest | CompletionRequest, header: str | None, patience_s: float | None
) -> Response:
    personalize = body.personalize
    if _known(body.model) == BASE_MODEL:
        if personalize is Personalize.MERGED:
            raise InvalidRequest("personalize is merged, but the model is base", param="personalize")
        personalize = Personalize.NONE
    parts, users, user_id = parts_of(request), users_of(request), _user_id(body.user, header)
    request_of = partial(
        GenerationRequest,
        user=None if user_id is None else users.user(user_id),
        personalize=personalize,
        strength=body.strength,
        sampling=body.passed,
        stream=body.stream,
        splittable=False,  # logprobs, tool calls and several choices are not put together again
        cache_salt=users.cache_salt,
        caller=caller_of(request),
        patience_s=patience_s,
        user_param="user",
    )
    if isinstance(body, ChatRequest):
        kind, of_its_own = "chat.completion", body.max_completion_tokens
        wanted = request_of(
            id_prefix="chatcmpl",
            messages=[message.model_dump(exclude_unset=True) for message in body.messages],
            history=items_wanted(body.history, parts.bank.manifest.history_default),
            max_tokens=of_its_own or body.max_tokens,
            max_tokens_param="max_completion_tokens" if of_its_own else "max_tokens",
            prompt_param="messages",
        )
    else:
        kind = "text_completion"
        wanted = request_of(
            id_prefix="cmpl", messages=[], prompt=body.prompt, max_tokens=body.max_tokens, prompt_param="prompt"
        )
    return _OpenAIResponse(parts, wanted, body, kind)


def _known(model: str) -> str:
    if model not in _MODELS:
        message = f"the model {excerpt(model)} does not exist: there are {' and '.join(_MODELS)}"
        raise NotFound(message, param="model", code="model_not_found")
    return model


def _user_id(user: str | None, header: str | None) -> str | None:
    if header is None:
        return user
    try:
        named = check_user_id(header.encode("latin-1").decode())
    except UnicodeDecodeError:
        raise InvalidRequest(f"X-User-ID must be UTF-8, got {excerpt(header)}", param="x-user-id") from None
    except ValueError as error:
        raise InvalidRequest(f"X-User-ID {error}, got {excerpt(header)}", param="x-user-id") from None
    if user is not None and unicodedata.normalize("NFC", user) != unicodedata.normalize("NFC", named):
        message = f"user is {excerpt(user)}, but X-User-ID is {excerpt(named)}: send one of them"
        raise InvalidRequest(message, param="user")
    return named


class _OpenAIResponse(AnswerResponse):
    """An answer whose `object` is `kind`, without a chunk's ending; `model` as the request named it."""

    def __init__(self, parts: Parts, wanted: GenerationRequest, body: OpenAIRequest, kind: str) -> None:
        super().__init__(parts, wanted)
        self._model = body.model
        self._options = body.stream_options or StreamOptions()
        self._kind = kind

    async def whole(self, answer: Answer) -> bytes:
        values = [value async for _, value in answer.pieces()]
        value = values[0] if answer.stream.first.first_token_s is None else joined(values, self._kind)
        self._make_public(value, answer, self._kind)
        value["personalization"] = PersonalizationAnswer.of(answer).model_dump()
        return orjson.dumps(value)

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        kind = f"{self._kind}.chunk" if self._kind == "chat.completion" else self._kind
        personalization: PersonalizationAnswer | None = None
        async for _, chunk in answer.pieces():
            if not chunk["choices"] and not self._options.include_usage:
                continue
            self._make_public(chunk, answer, kind)
            if not self._options.include_usage:
                chunk.pop("usage", None)
            elif chunk["choices"] and not self._options.continuous_usage_stats:
                chunk["usage"] = None
            if personalization is None:
                chunk["personalization"] = personalization = PersonalizationAnswer.of(answer)
            yield event(chunk)

    def headers_of(self, answer: Answer) -> dict[str, str]:
        who = answer.personalization
        return {"X-MTA-Level": who.level.value} | ({"X-MTA-Recipe": who.public_recipe} if who.public_recipe else {})

    def _make_public(self, value: dict[str, Any], answer: Answer, kind: str) -> None:
        """Put public names for the engine's, of which the model's may hold a user's key."""
        value["id"], value["object"], value["model"] = answer.id, kind, self._model
        for name in _INTERNAL:
            value.pop(name, None)
        said = [choice.get("message") or choice.get("delta") or {} for choice in value["choices"]]
        for part in (value, value.get("usage") or {}, *value["choices"], *said):
            for name in [name for name, inner in part.items() if inner is None and name not in _NULLABLE]:
                del part[name]


def joined(chunks: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The answer that an engine would have given in one piece, out of all its chunks, the last with the usage.

    They are of one choice or several, in any order between the choices.
    """
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            if (choice := choices.get(piece["index"])) is None:
                said = {"message": {"role": "assistant", "content": "", "refusal": None}}
                choice = {"index": piece["index"]} | (said if "delta" in piece else {"text": ""})
                choices[piece["index"]] = choice = choice | {"logprobs": None, "finish_reason": None}
            _add(choice, piece)
    common = {name: value for name, value in chunks[0].items() if name != "choices"}
    ordered = [choices[index] for index in sorted(choices)]
    return common | {"object": kind, "choices": ordered, "usage": chunks[-1].get("usage")}


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, said in piece.get("delta", {}).items():
        if isinstance(said, str) and name != "role":
            choice["message"][name] = (choice["message"].get(name) or "") + said
    if "text" in piece:
        choice["text"] += piece["text"]
    for name, values in (piece.get("logprobs") or {}).items():
        known = choice["logprobs"] = choice["logprobs"] or {}
        known[name] = [*(known.get(name) or ()), *values] if isinstance(values, list) else values
    choice |= {name: value for name, value in piece.items() if value is not None and name not in _PIECEWISE}
