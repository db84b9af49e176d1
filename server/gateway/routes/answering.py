"""An answer on its way to the client, streamed or whole; what it looks like, its route decides."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from fastapi import Response

from server.errors import ApiError
from server.gateway.access.limiter import usage_of
from server.gateway.generation.generator import Answer, Timings
from server.gateway.generation.request import GenerationRequest
from server.gateway.http.errors import ErrorAnswer
from server.gateway.http.middleware import notes_of
from server.gateway.http.streaming import DONE, ClientGone, EventSender, event, unless_gone
from server.gateway.parts import Parts

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

log = logging.getLogger("mta.gateway")


class AnswerFormat(Protocol):
    """How a route writes an answer."""

    async def whole(self, answer: Answer) -> str | bytes:
        """The JSON of an answer, once it is complete."""
        ...

    def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """The events of a streamed answer, without `[DONE]`."""
        ...

    def headers(self, answer: Answer) -> dict[str, str]:
        """Headers besides `Server-Timing` and what is left of limits."""
        ...


class AnswerResponse(Response):
    """Generates while it is being sent; when the client leaves, the engine stops."""

    def __init__(self, parts: Parts, request: GenerationRequest, form: AnswerFormat) -> None:
        super().__init__()
        self._parts = parts
        self._request = request
        self._form = form
        self._answer: Answer | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timings = Timings(notes_of(scope).started_s)
        write = self._stream if self._request.stream else self._whole
        try:
            await unless_gone(receive, write(timings, scope, receive, send))
        except ClientGone:
            notes_of(scope).gone = True
            self._parts.metrics.disconnects.inc()
        finally:
            self._count_gaps(timings)

    async def _whole(self, timings: Timings, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._parts.generator.answer(self._request, usage_of(scope), timings) as answer:
            self._begin(scope, answer)
            content = await self._form.whole(answer)
        self._observe(answer)
        await Response(content, headers=self._known_headers(timings), media_type="application/json")(
            scope, receive, send
        )

    async def _stream(self, timings: Timings, scope: Scope, receive: Receive, send: Send) -> None:
        async with EventSender(send, lambda: self._known_headers(timings)) as sender:
            try:
                async with self._parts.generator.answer(self._request, usage_of(scope), timings) as answer:
                    self._begin(scope, answer)
                    notes_of(scope).generating = True
                    async for data in self._form.events(answer):
                        await sender.write(data)
                    notes_of(scope).generating = False
                    self._observe(answer)
                    await sender.write(DONE)
            except Exception as error:
                if not sender.begun:
                    raise
                if isinstance(error, ApiError):
                    log.warning("%s", error.explained)
                else:
                    log.exception("%s broke", notes_of(scope).answer_id or "a stream")
                    error = ApiError("the gateway failed in the middle of the answer")
                notes_of(scope).broken = True
                self._parts.metrics.broken_streams.labels(error.code).inc()
                await sender.write(event(ErrorAnswer.of(error)))
            await sender.end()

    def _begin(self, scope: Scope, answer: Answer) -> None:
        """Keep the answer for the headers, and note for the log and the count what only this route knows."""
        self._answer, notes = answer, notes_of(scope)
        notes.answer_id, notes.level = answer.id, answer.personalization.level.value
        metrics, stream, timings = self._parts.metrics, answer.stream, answer.timings
        metrics.fallbacks.inc(answer.fallbacks)
        metrics.histories_left_out.inc(answer.prompt.reason is not None)
        if answer.waited_s:
            timings.record("queue", 0.0, answer.waited_s)
        if stream.first_token_s is not None:
            timings.record("engine_ttft", stream.sent_s, stream.first_token_s)
            metrics.ttft.labels(notes.level).observe(stream.first_token_s - timings.started_s)
        self._parts.tracing.note(level=notes.level)
        if made_in := answer.personalization.made_in:
            self._parts.tracing.link(made_in)

    def _known_headers(self, timings: Timings) -> dict[str, str]:
        """Headers as far as they are known: a comment can begin a stream before anything is."""
        known = {**self._form.headers(self._answer), **self._answer.limits} if self._answer else {}
        return {"Server-Timing": timings.header()} | known

    def _observe(self, answer: Answer) -> None:
        self._count_gaps(answer.timings)
        self._parts.metrics.observe(answer.timings.ms, answer.personalization.level.value, answer.stream.usage)

    def _count_gaps(self, timings: Timings) -> None:
        while timings.gaps_s:
            self._parts.metrics.inter_token.observe(timings.gaps_s.pop())
