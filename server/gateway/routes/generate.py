"""`POST /generate`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from bank.items.prompt import chat_messages
from server.gateway.access.caller import Caller, caller_of
from server.gateway.generation.asked import Asked
from server.gateway.generation.generator import Answer
from server.gateway.http.errors import ErrorAnswer
from server.gateway.http.json_body import JsonRoute
from server.gateway.http.requests import GenerateRequest, QueueTimeout, items_wanted
from server.gateway.http.streaming import event
from server.gateway.parts import parts_of, users_of
from server.gateway.routes.answering import Answering
from server.gateway.routes.answers import GenerateAnswer, generate_answer
from server.gateway.routes.chunks import Chunks
from server.gateway.routes.examples import GENERATED, STREAMED
from server.store.tenants.user_key import UserKeys

_SAMPLING = {"max_tokens", "temperature", "top_p", "stop", "seed"}

router = APIRouter(route_class=JsonRoute, tags=["generate"])


@router.post(
    "/generate",
    response_model=GenerateAnswer,
    responses={
        200: {
            "content": {
                "application/json": {"example": GENERATED.model_dump(mode="json")},
                "text/event-stream": {"example": STREAMED},
            }
        },
        "4XX": {"model": ErrorAnswer},
        "5XX": {"model": ErrorAnswer},
    },
)
async def generate(request: Request, body: GenerateRequest, x_queue_timeout: QueueTimeout = None) -> Response:
    """Answer a prompt in the user's own manner.

    With `stream` the answer comes as server-sent events in the shape of OpenAI's chunks: the first carries
    `personalization`, the last `usage` and `timings_ms`, then `data: [DONE]`. An error midway is an event
    `{"error": …}`, without `[DONE]`. While there is nothing to send, a comment (`: keep-alive`) comes every 15 seconds.
    The first event or comment sets the status to 200, even if no text has begun: a later error is an event, an earlier
    one an answer with a status of its own.
    """
    parts = parts_of(request)
    usual = parts.bank.manifest.history_default
    asked = asked_of(body, users_of(request), caller_of(request), history=usual, patience_s=x_queue_timeout)
    return Answering(parts, asked, _Texts())


def asked_of(
    request: GenerateRequest, users: UserKeys, caller: Caller, *, history: int = 0, patience_s: float | None = None
) -> Asked:
    """What a request of a tenant asks of the generator; `history` is what `auto` stands for."""
    if request.prompt is not None:
        messages = chat_messages(request.prompt)
    else:
        messages = [message.model_dump() for message in request.messages or ()]
    return Asked(
        id_prefix="gen",
        user=users.user(request.user_id),
        personalize=request.personalize,
        strength=request.strength,
        messages=messages,
        history=items_wanted(request.history, history),
        max_tokens=request.max_tokens,
        sampling=request.model_dump(include=_SAMPLING, exclude_none=True),
        stream=request.stream,
        splittable=True,
        cache_salt=users.cache_salt,
        caller=caller,
        patience_s=patience_s,
        user_param="user_id",
        prompt_param=request.conversation_param,
    )


class _Texts:
    """The form of `/generate`: texts."""

    async def whole(self, answer: Answer) -> str:
        text = "".join([piece async for piece in answer.texts()])
        return generate_answer(answer, text).model_dump_json()

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        chunks = Chunks(answer)
        yield event(chunks.first())
        async for text in answer.texts():
            yield event(chunks.text(text))
        yield event(chunks.last())

    def headers(self, answer: Answer) -> dict[str, str]:
        return {}
