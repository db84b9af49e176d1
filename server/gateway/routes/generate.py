"""`POST /generate`."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from server.errors import ApiError
from server.gateway.generation.generator import Answer
from server.gateway.generation.timings import Timings
from server.gateway.http.disconnect import ClientGone, unless_gone
from server.gateway.http.errors import ErrorAnswer
from server.gateway.http.json_body import JsonRoute
from server.gateway.http.middleware import notes_of
from server.gateway.http.requests import GenerateRequest
from server.gateway.http.streaming import DONE, EventSender, event
from server.gateway.parts import Parts, parts_of
from server.gateway.routes.answers import GenerateAnswer, generate_answer
from server.gateway.routes.chunks import Chunks
from server.gateway.routes.examples import GENERATED, STREAMED

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

log = logging.getLogger("mta.gateway")
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
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Answer a prompt in the user's own manner.

    With `stream` the answer comes as server-sent events in the shape of OpenAI's chunks: the first carries
    `personalization`, the last `usage` and `timings_ms`, then `data: [DONE]`. An error midway is an event
    `{"error": …}`, without `[DONE]`. While there is nothing to send, a comment (`: keep-alive`) comes every 15 seconds.
    The first event or comment sets the status to 200, even if no text has begun: a later error is an event, an earlier
    one an answer with a status of its own.
    """
    return _Generation(parts_of(request), body)


class _Generation(Response):
    """Generates while it is being sent; when the client leaves, the engine is told to stop."""

    def __init__(self, parts: Parts, request: GenerateRequest) -> None:
        super().__init__()
        self._parts = parts
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = self._stream if self._request.stream else self._whole
        try:
            await unless_gone(receive, write(scope, receive, send))
        except ClientGone:
            notes_of(scope).gone = True
            self._parts.metrics.disconnects.inc()

    def _started(self, timings: Timings) -> AbstractAsyncContextManager[Answer]:
        return self._parts.generator.answer(self._request, timings)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        timings = Timings(notes_of(scope).started_s)
        async with self._started(timings) as answer:
            _note(scope, answer)
            text = "".join([piece async for piece in answer.texts()])
            self._parts.metrics.observe(timings.ms)
            content = generate_answer(answer, text).model_dump_json()
            headers = {"Server-Timing": timings.header()}
            await Response(content, headers=headers, media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        timings = Timings(notes_of(scope).started_s)
        async with EventSender(send, lambda: {"Server-Timing": timings.header()}) as sender:
            try:
                async with self._started(timings) as answer:
                    _note(scope, answer)
                    await self._events(answer, sender)
            except ApiError as error:
                if not sender.begun:
                    raise
                await self._break_off(error, sender)
            except Exception:
                if not sender.begun:
                    raise
                log.exception("%s broke", notes_of(scope).request_id or "a stream")
                await self._break_off(ApiError("the gateway failed in the middle of the answer"), sender)
            await sender.end()

    async def _events(self, answer: Answer, sender: EventSender) -> None:
        chunks = Chunks(answer)
        await sender.write(event(chunks.first()))
        async for text in answer.texts():
            await sender.write(event(chunks.text(text)))
        self._parts.metrics.observe(answer.timings.ms)
        await sender.write(event(chunks.last()) + DONE)

    async def _break_off(self, error: ApiError, sender: EventSender) -> None:
        log.warning("%s", error.explained)
        self._parts.metrics.broken_streams.labels(error.code).inc()
        await sender.write(event(ErrorAnswer.of(error)))


def _note(scope: Scope, answer: Answer) -> None:
    """Note for the log and the count what only this route knows."""
    notes = notes_of(scope)
    notes.request_id, notes.level = answer.id, answer.personalization.level.value
