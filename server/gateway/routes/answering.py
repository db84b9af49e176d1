"""Send an answer to the client, streamed or whole; each route defines the format."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Self

from fastapi import Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from adapters.recipe import PER_MILLE, FusionRecipe, anchor_id
from bank.items.profile import Item
from bank.lookup.serving import AnchorWeight
from server.errors import ApiError
from server.gateway.access.limiter import usage_of
from server.gateway.engines.chat import Conversation
from server.gateway.experiments.arms import Arm, Level
from server.gateway.generation.generator import Answer, Timings
from server.gateway.generation.request import GenerationRequest
from server.gateway.http.errors import ErrorAnswer
from server.gateway.http.streaming import DONE, ClientGone, EventSender, event, unless_gone
from server.gateway.learning.messages import item_of
from server.gateway.operating.middleware import notes_of
from server.gateway.parts import Call

log = logging.getLogger("mta.gateway")


class AnchorAnswer(BaseModel, frozen=True):
    id: str = Field(examples=["a03"])
    weight: float | None = Field(
        description="Weight in the recipe; a negative weight moves the answer away from this anchor. Null in a bank of "
        "directions, whose recipes name no anchors: these are the nearest ones."
    )
    similarity: float | None = Field(
        description="Similarity to the user's profile, -1 to 1; null if other anchors are closer by now."
    )
    gain: float | None = Field(
        description="Predicted reduction of the loss on the user's own items, in nats per token; null if the weights "
        "come from topics."
    )

    @classmethod
    def of(cls, anchor: int, weight: float | None, known: AnchorWeight | None) -> Self:
        """Return an anchor by its number and its weight in the recipe; `known`: what the current profile says of it."""
        gain = known.gain if known else None
        return cls(
            id=anchor_id(anchor),
            weight=weight,
            similarity=round(known.similarity, 4) if known else None,
            gain=None if gain is None else round(gain, 4),
        )


class PersonalizationAnswer(BaseModel, frozen=True):
    """The level of personalisation, the anchors in the recipe and the time of each stage."""

    level: Level
    recipe: str | None = Field(
        description="Name of the fused adapter, without the user adapter that `stacked` adds; null for the base model."
    )
    source: str | None = Field(description="Source of the weights; null for the base model.")
    anchors: list[AnchorAnswer] = Field(description="Largest weight first, or the nearest first.")
    history: int = Field(description="Number of the user's past items in the prompt.")
    reason: str | None = Field(description="Why the level is not higher, if known.")
    timings_ms: dict[str, float] = Field(
        description="`profile`: store. `recipe`: index and weights. `history`: past items. `engine_ttft`: engine, "
        "until its first streamed token. `engine`: engine in total. `total`: since the request arrived."
    )
    history_reason: str | None = Field(
        description="Why the requested past items are not in the prompt: they could not be read in time, or none has "
        "the fields that prompts quote."
    )
    arm: Arm = Field(
        description="Arm that the user is in this week (`MTA_HOLDOUT`); `none`: the answer is not compared."
    )
    learned: bool = Field(description="Whether the last user message becomes an item of the user's history (`learn`).")
    phrases: int = Field(description="Number of the user's phrases that were mixed in (`words`).")
    moved: int = Field(
        description="Number of the answer's tokens that a phrase had proposed; in a stream, see its last chunk."
    )

    @classmethod
    def of(cls, answer: Answer) -> Self:
        personalization = answer.personalization
        return cls(
            level=personalization.level,
            recipe=personalization.public_recipe,
            source=personalization.source,
            anchors=anchor_answers(personalization.recipe, personalization.weights) if personalization.recipe else [],
            history=answer.prompt.items,
            phrases=len(personalization.phrases),
            moved=answer.stream.moved,
            history_reason=answer.prompt.reason,
            reason=personalization.reason,
            timings_ms=answer.timings.ms,
            arm=personalization.arm,
            learned=answer.request.learnt is not None,
        )


class Usage(BaseModel, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def anchor_answers(recipe: FusionRecipe, weights: Iterable[AnchorWeight]) -> list[AnchorAnswer]:
    """Return the anchors of a recipe, largest weight first, with the current similarity and gain of each.

    A recipe of directions has none; the anchors nearest to the user are returned, nearest first.
    """
    if recipe.steps:
        return [AnchorAnswer.of(near.anchor, None, near) for near in weights]
    known = {weight.anchor: weight for weight in weights}
    answers = [AnchorAnswer.of(term.anchor, term.weight / PER_MILLE, known.get(term.anchor)) for term in recipe.terms]
    return sorted(answers, key=lambda answer: (-abs(answer.weight or 0), answer.id))


def learnt_of(call: Call, messages: Conversation, learn: bool | None) -> Item | None:
    """Return the last user message as an item if it is to be learnt; `learn` None: as the caller's key says."""
    wanted = call.caller.policy.learn if learn is None else learn
    has_room = wanted and messages and call.gateway.learner.has_room(call.caller.tenant)
    return item_of(messages, call.parts.bank.task) if has_room else None


class AnswerResponse(Response):
    """A response that generates while it is sent and stops the engine if the client disconnects."""

    ending = DONE  # what follows the last event of a stream

    def __init__(self, call: Call, request: GenerationRequest) -> None:
        super().__init__()
        self._call = call
        self._request = request
        self._answer: Answer | None = None

    @abstractmethod
    async def whole(self, answer: Answer) -> str | bytes:
        """Wait until the answer is complete and return its JSON."""

    @abstractmethod
    def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """Yield the events of a streamed answer, without its `ending`."""

    def failure(self, error: ApiError) -> bytes:
        """Return the event that ends a stream after an error."""
        return event(ErrorAnswer.of(error))

    def again(self) -> GenerationRequest | None:
        """Return what to ask the engine next, if an answer that is not streamed is not good enough."""
        return None

    def headers_of(self, answer: Answer) -> dict[str, str]:
        """Return headers in addition to `Server-Timing` and the remaining limits."""
        return {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timings = Timings(notes_of(scope).started_s, self._call.gateway.metrics.inter_token.observe)
        write = self._stream if self._request.stream else self._whole
        try:
            await unless_gone(receive, write(timings, scope, receive, send))
        except ClientGone:
            notes_of(scope).gone = True
            self._call.gateway.metrics.disconnects.inc()

    async def _whole(self, timings: Timings, scope: Scope, receive: Receive, send: Send) -> None:
        request: GenerationRequest | None = self._request
        while request:
            async with self._answering(request, timings, scope) as answer:
                content = await self.whole(answer)
            request = self.again()
        headers = self._known_headers(timings)
        await Response(content, headers=headers, media_type="application/json")(scope, receive, send)

    async def _stream(self, timings: Timings, scope: Scope, receive: Receive, send: Send) -> None:
        notes = notes_of(scope)
        async with EventSender(send, lambda: self._known_headers(timings)) as sender:
            try:
                async with self._answering(self._request, timings, scope) as answer:
                    notes.generating = True
                    async for data in self.events(answer):
                        await sender.write(data)
                    notes.generating = False
                await sender.write(self.ending)
            except Exception as error:
                if not sender.begun:
                    raise
                if isinstance(error, ApiError):
                    log.warning("%s", error.explained)
                else:
                    log.exception("%s failed", notes.answer_id or "a stream")
                    error = ApiError("the gateway failed in the middle of the answer")
                notes.broken = True
                self._call.gateway.metrics.broken_streams.labels(error.code).inc()
                await sender.write(self.failure(error))

    @asynccontextmanager
    async def _answering(self, request: GenerationRequest, timings: Timings, scope: Scope) -> AsyncIterator[Answer]:
        notes = notes_of(scope)
        async with self._call.parts.generator.answer(request, usage_of(scope), timings) as answer:
            self._answer = answer
            notes.answer_id, notes.level = answer.id, answer.personalization.level.value
            yield answer

    def _known_headers(self, timings: Timings) -> dict[str, str]:
        """Return the headers known so far: a keep-alive comment may start the stream before there is an answer."""
        known = {**self.headers_of(self._answer), **self._answer.limits} if self._answer else {}
        return {"Server-Timing": timings.header()} | known
