"""`POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`, `GET /v1/models/{model}`."""

from __future__ import annotations

import unicodedata
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response

from adapters.errors import excerpt
from server.engine_protocol import BASE_MODEL
from server.errors import InvalidRequest, NotFound
from server.gateway.access.keys import caller_of
from server.gateway.generation.request import GenerationRequest, Personalize
from server.gateway.http.errors import ErrorAnswer
from server.gateway.http.json_body import JsonRoute
from server.gateway.parts import parts_of, users_of
from server.gateway.routes.answering import AnswerResponse
from server.gateway.routes.openai.answers import ChatCompletion, ModelAnswer, ModelsAnswer, OpenAIFormat, TextCompletion
from server.gateway.routes.openai.requests import PERSONAL_MODEL, ChatRequest, CompletionRequest, StreamOptions
from server.gateway.routes.requests import QueueTimeout, items_wanted
from server.store.tenants.user_key import check_user_id

_MODELS = (PERSONAL_MODEL, BASE_MODEL)
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    "4XX": {"model": ErrorAnswer},
    "5XX": {"model": ErrorAnswer},
}

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
    return AnswerResponse(parts, wanted, OpenAIFormat(body.model, kind, body.stream_options or StreamOptions()))


def _known(model: str) -> str:
    if model not in _MODELS:
        raise NotFound(
            f"the model {excerpt(model)} does not exist: there are {' and '.join(_MODELS)}",
            param="model",
            code="model_not_found",
        )
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
        raise InvalidRequest(
            f"user is {excerpt(user)}, but X-User-ID is {excerpt(named)}: send one of them", param="user"
        )
    return named
