"""`POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`, `GET /v1/models/{model}`.

Responses are those of the engine with public names, and with `personalization` added.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Header, Path, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import Headers

from adapters.errors import excerpt
from server.engine_protocol import BASE_MODEL
from server.errors import InvalidRequest, NotFound
from server.gateway.engines.chat import MOVED, Conversation
from server.gateway.generation.generator import Answer
from server.gateway.generation.request import GenerationRequest, Personalize
from server.gateway.http.bodies import JsonRoute
from server.gateway.http.streaming import event
from server.gateway.parts import Call, call_of
from server.gateway.routes.answering import AnswerResponse, PersonalizationAnswer, learnt_of
from server.gateway.routes.openai.requests import (
    PERSONAL_MODEL,
    ChatRequest,
    CompletionRequest,
    ModelRequest,
    OpenAIRequest,
    StreamOptions,
    TranslatedRequest,
)
from server.gateway.routes.requests import QueueTimeout
from server.gateway.routes.rewrite import draft_turns, facts_of
from server.store.tenants.user_key import check_user_id

MAX_JOINED_BYTES = 64 << 20  # 40,000 tokens with `top_logprobs` 20, for which the event loop stands still for 0.3 s

_MODELS = (PERSONAL_MODEL, BASE_MODEL)
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_INTERNAL_FIELDS = ("kv_transfer_params", "ec_transfer_params", "prompt_token_ids")  # of engines and gateways alone
_NULLABLE = {"content", "refusal", "logprobs", "finish_reason", "usage"}  # in OpenAI's schema; other nulls are removed
_JOINED = {"delta", "text", "logprobs"}


class NamedAnswer(BaseModel, frozen=True):
    """An answer, in a format that others define and document."""

    id: str
    model: str = Field(description="The model named in the request.")
    usage: dict[str, Any] | None
    personalization: PersonalizationAnswer = Field(description="Not part of the format's own schema.")


class ChatCompletion(NamedAnswer, frozen=True):
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    choices: list[dict[str, Any]] = Field(
        description="OpenAI's: `index`, `message`, `finish_reason`, `logprobs`; streams have `delta` for `message`."
    )


class TextCompletion(NamedAnswer, frozen=True):
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    choices: list[dict[str, Any]] = Field(description="OpenAI's: `index`, `text`, `finish_reason`, `logprobs`.")


class ModelAnswer(BaseModel, frozen=True):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(0, description="Unknown.")
    owned_by: str = "mta"


class ModelsAnswer(BaseModel, frozen=True):
    """All models; recipes are not listed."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


# Documents the default of the setting `user_headers`; `_user_id` reads the headers that the setting names.
UserHeader = Annotated[
    str | None,
    Header(
        alias="X-User-ID",
        description="User id; alternative to the field `user`. The server may read other headers (`MTA_USER_HEADERS`).",
    ),
]
router = APIRouter(route_class=JsonRoute, prefix="/v1", tags=["openai"])


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat_completions(
    request: Request, body: ChatRequest, x_user_id: UserHeader = None, x_queue_timeout: QueueTimeout = None
) -> Response:
    """Answer a conversation in the user's own manner, in OpenAI's format.

    Without a user, or with the model `base`, the base model answers. The field `personalization` (in a stream, of the
    first chunk) and the headers X-MTA-Level and X-MTA-Recipe describe the personalisation. Hints such as `store` are
    ignored, and listed in X-MTA-Ignored; fields that control the engine are refused. Without a length or a temperature
    the server's defaults apply.
    """
    return answer_to(request, body, x_queue_timeout, OpenAIResponse)


@router.post("/completions", response_model=TextCompletion, responses=STREAMED)
async def completions(
    request: Request, body: CompletionRequest, x_user_id: UserHeader = None, x_queue_timeout: QueueTimeout = None
) -> Response:
    """Continue a prompt in the user's own manner, in OpenAI's format, without a chat template or history.

    Everything else is as for chat completions.
    """
    return answer_to(request, body, x_queue_timeout, OpenAIResponse)


@router.get("/models")
async def models() -> ModelsAnswer:
    """List the models that requests can name."""
    return ModelsAnswer(data=[ModelAnswer(id=name) for name in _MODELS])


@router.get("/models/{model:path}")
async def model(model: Annotated[str, Path(description="Model name.", examples=[PERSONAL_MODEL])]) -> ModelAnswer:
    """Return one model."""
    return ModelAnswer(id=_checked_model(model))


def answer_to(
    request: Request,
    body: ChatRequest | CompletionRequest | TranslatedRequest,
    patience_s: float | None,
    response: Callable[..., Response],
) -> Response:
    """Return the `response` to a request in any of the formats."""
    asked = body.chat if isinstance(body, TranslatedRequest) else body
    personalize = body.personalize
    if _checked_model(body.model) == BASE_MODEL:
        if personalize is Personalize.MERGED:
            raise InvalidRequest("personalize is merged, but the model is base", param="personalize")
        personalize = Personalize.NONE
    call = call_of(request)
    bank, settings = call.parts.bank, call.gateway.settings
    user_id = _user_id(asked.user, request.headers, settings.user_header_names)
    messages: Conversation = []
    learn = asked.learn
    history: int | Literal["auto"] = 0
    if isinstance(asked, ChatRequest):
        messages = [message.model_dump(exclude_unset=True) for message in asked.messages]
        _check_template_arguments(asked.chat_template_kwargs or {}, settings.template_arguments)
        if asked.draft is not None:
            messages[-1:], learn = draft_turns(asked.draft, bank.task), False
        history = asked.history if asked.history is not None else "auto" if call.caller.policy.history else 0
    generation = GenerationRequest(
        id_prefix=body.ID_PREFIX,
        user=None if user_id is None else call.user(user_id),
        personalize=personalize,
        strength=asked.strength,
        messages=messages,
        prompt=asked.prompt if isinstance(asked, CompletionRequest) else None,
        words=asked.words,
        history=bank.manifest.history_default if history == "auto" else history,
        max_tokens=asked.longest,
        sampling=asked.engine_fields,
        stream=asked.stream,
        users=call.users,
        caller=call.caller,
        holdout=call.holdout,
        learnt=learnt_of(call, messages, learn) if user_id and personalize is not Personalize.NONE else None,
        patience_s=patience_s,
        user_param="user",
        prompt_param=body.PROMPT,
        max_tokens_param="max_completion_tokens" if "max_completion_tokens" in body.model_fields_set else body.LONGEST,
    )
    return response(call, generation, body)


def _checked_model(model: str) -> str:
    if model not in _MODELS:
        message = f"the model {excerpt(model)} does not exist: use {' or '.join(_MODELS)}"
        raise NotFound(message, param="model", code="model_not_found")
    return model


def _check_template_arguments(given: Iterable[str], allowed: Sequence[str]) -> None:
    if refused := next((name for name in given if name not in allowed), None):
        known = ", ".join(allowed) or "none"
        message = f"chat_template_kwargs has {excerpt(refused)}; allowed here (MTA_CHAT_TEMPLATE_KWARGS): {known}"
        raise InvalidRequest(message, param="chat_template_kwargs", code="refused_field")


def _user_id(user: str | None, headers: Headers, names: Sequence[str]) -> str | None:
    """Return the id in the first of the headers `names` that is not empty, which must be `user` if both are sent."""
    name = next((name for name in names if any(headers.getlist(name))), None)
    if name is None:
        return user
    header, *others = headers.getlist(name)
    if others:
        raise InvalidRequest(f"{name} is sent {1 + len(others)} times: send it once", param=name.lower())
    try:
        header_id = check_user_id(header.encode("latin-1").decode())
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} must be UTF-8, got {excerpt(header)}", param=name.lower()) from None
    except ValueError as error:
        raise InvalidRequest(f"{name} {error}, got {excerpt(header)}", param=name.lower()) from None
    if user is not None and unicodedata.normalize("NFC", user) != unicodedata.normalize("NFC", header_id):
        message = f"user is {excerpt(user)}, but {name} is {excerpt(header_id)}: send one of them"
        raise InvalidRequest(message, param="user")
    return header_id


class ModelResponse(AnswerResponse):
    """An answer to a request that named a model, with the headers about its personalisation."""

    def __init__(self, call: Call, generation: GenerationRequest, body: ModelRequest) -> None:
        super().__init__(call, generation)
        self._model = body.model
        self._ignored = {"X-MTA-Ignored": ", ".join(body.ignored)} if body.ignored else {}

    def headers_of(self, answer: Answer) -> dict[str, str]:
        recipe = answer.personalization.public_recipe
        known = {"X-MTA-Level": answer.personalization.level.value, **self._ignored}
        return known | ({"X-MTA-Recipe": recipe} if recipe else {})


class OpenAIResponse(ModelResponse):
    """An answer in OpenAI's format."""

    def __init__(self, call: Call, generation: GenerationRequest, body: OpenAIRequest) -> None:
        super().__init__(call, generation, body)
        self._options = body.stream_options or StreamOptions()
        self._is_chat = isinstance(body, ChatRequest)
        self._draft = body.draft if isinstance(body, ChatRequest) else None

    async def whole(self, answer: Answer) -> bytes:
        streamed, joined = answer.stream.first.first_token_s is not None, JoinedChunks()
        async for _, value in answer.pieces():
            if streamed:
                joined.add(value)
        if streamed:
            value = joined.value()
        self._make_public(value, answer, "chat.completion" if self._is_chat else "text_completion")
        value["personalization"] = PersonalizationAnswer.of(answer).model_dump()
        if self._draft is not None:
            for choice in value["choices"]:
                choice["rewritten"] = facts_of(self._draft, choice["message"]["content"] or "")
        return orjson.dumps(value)

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
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

    def _make_public(self, value: dict[str, Any], answer: Answer, kind: str) -> None:
        """Replace the engine's names with public ones: its model name may contain a user's key."""
        value["id"], value["object"], value["model"] = answer.public_id, kind, self._model
        for name in _INTERNAL_FIELDS:
            value.pop(name, None)
        contents = [choice.get("message") or choice.get("delta") or {} for choice in value["choices"]]
        for choice in value["choices"]:
            choice.pop(MOVED, None)
        for part in (value, value.get("usage") or {}, *value["choices"], *contents):
            for name in [name for name, inner in part.items() if inner is None and name not in _NULLABLE]:
                del part[name]


class JoinedChunks:
    """The chunks of a stream, joined into the answer that the engine would have sent whole; the last one has the usage.

    The chunks of several choices may be interleaved in any order. Only what will be sent is kept: parsed chunks would
    take many times the memory.
    """

    def __init__(self) -> None:
        self._common: dict[str, Any] = {}
        self._choices = defaultdict[int, _JoinedChoice](_JoinedChoice)
        self._bytes = 0

    def add(self, chunk: dict[str, Any]) -> None:
        for piece in chunk["choices"]:
            self._bytes += self._choices[piece["index"]].add(piece)
        if self._bytes > MAX_JOINED_BYTES:
            most = f"the answer exceeds {MAX_JOINED_BYTES >> 20} MiB, the maximum that is not streamed"
            raise InvalidRequest(f"{most}: set stream, or ask for less", param="stream", code="answer_too_large")
        self._common |= chunk

    def value(self) -> dict[str, Any]:
        return self._common | {"choices": [self._choices[index].value() for index in sorted(self._choices)]}


class _JoinedChoice:
    def __init__(self) -> None:
        self._texts = defaultdict[str, bytearray](bytearray)  # by field of the message; `text` if there is no message
        self._logprobs = defaultdict[str, bytearray](bytearray)  # by list, its items as JSON, each with a comma
        self._others: dict[str, Any] = {"finish_reason": None}

    def add(self, piece: dict[str, Any]) -> int:
        """Add a piece and return its size in bytes."""
        size = 0
        for name, text in (piece.get("delta") or {"text": piece.get("text")}).items():
            if isinstance(text, str) and name != "role":
                self._texts[name] += (raw := text.encode())
                size += len(raw)
        for name, items in (piece.get("logprobs") or {}).items():
            self._logprobs[name] += (raw := b"".join(orjson.dumps(item) + b"," for item in items or ()))
            size += len(raw)
        self._others |= {name: value for name, value in piece.items() if value is not None and name not in _JOINED}
        return size

    def value(self) -> dict[str, Any]:
        texts = {name: text.decode() for name, text in self._texts.items()}
        message = {"message": {"role": "assistant", "content": "", "refusal": None} | texts}
        logprobs = {name: orjson.Fragment(b"[" + items[:-1] + b"]") for name, items in self._logprobs.items()}
        return self._others | (texts if "text" in texts else message) | {"logprobs": logprobs or None}
