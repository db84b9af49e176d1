"""One answer, from request to last token: who speaks, what the engine says, and what to do if it lacks the adapter."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from server.engine_protocol import BASE_MODEL
from server.errors import ApiError, EngineFailed, Unavailable
from server.gateway.access.limiter import Counted, Limiter
from server.gateway.access.queue import EngineQueue
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import AdapterMissing, EngineClient, EngineRequest
from server.gateway.engines.stream import EngineStream, Piece, texts_of
from server.gateway.generation.answer_stream import AnswerStream, in_parts
from server.gateway.generation.asked import Asked
from server.gateway.generation.limits import Limits
from server.gateway.generation.personalizer import Personalization, Personalizer, may_speak
from server.gateway.generation.recall import Recall, Recalled
from server.gateway.generation.timings import Timings
from server.gateway.operating.metrics import Metrics
from server.watching.logs import request_id

if TYPE_CHECKING:
    from prometheus_client import Histogram

T = TypeVar("T")


@dataclass(slots=True)
class Answer:
    """An answer in progress.

    Attributes:
        id: of the request; it is in the engine's logs too.
        personalization: who speaks.
        recalled: the prompt, and how many past items are in it.
        stream: the engines'.
        timings: complete once `texts` or `pieces` has ended.
        left: headers that say what the caller may still use.
        inter_token: gets the time between pieces that the engine streams.
    """

    id: str
    personalization: Personalization
    recalled: Recalled
    stream: AnswerStream
    timings: Timings
    inter_token: Histogram
    left: Mapping[str, str]

    def texts(self) -> AsyncIterator[str]:
        """The pieces of text, none empty; see `AnswerStream.pieces`."""
        return self._timed(texts_of(self.stream.pieces()))

    def pieces(self) -> AsyncIterator[Piece]:
        """All that the engine sends; see `AnswerStream.pieces`."""
        return self._timed(self.stream.pieces())

    async def _timed(self, parts: AsyncIterator[T]) -> AsyncIterator[T]:
        last_s: float | None = None
        async for part in parts:
            if self.stream.first_token_s is not None:  # else it came whole
                now_s = time.perf_counter()
                if last_s is not None:
                    self.inter_token.observe(now_s - last_s)
                last_s = now_s
            yield part
        self.timings.record("engine", self.stream.sent_s)
        self.timings.finish()


class Generator:
    """Answers requests.

    Args:
        personalizer: says who may speak.
        recall: renders the prompt.
        engine: answers it.
        engines: know the model's context.
        limiter: counts what callers and users ask for.
        queue: gives out the places in the engines.
        max_prompt_chars: longest conversation, history included.
        metrics: counts fallbacks, and times tokens.
    """

    def __init__(
        self,
        personalizer: Personalizer,
        recall: Recall,
        engine: EngineClient,
        engines: Engines,
        *,
        limiter: Limiter,
        queue: EngineQueue,
        max_prompt_chars: int,
        metrics: Metrics,
    ) -> None:
        self._personalizer = personalizer
        self._recall = recall
        self._engine = engine
        self._engines = engines
        self._limiter = limiter
        self._queue = queue
        self._max_prompt_chars = max_prompt_chars
        self._metrics = metrics

    @asynccontextmanager
    async def answer(self, asked: Asked, counted: Counted, timings: Timings) -> AsyncIterator[Answer]:
        """Start an answer and wait for its first piece; leaving the context early aborts it in the engine.

        Args:
            asked: well-formed.
            counted: the request, which is within its key's own limits; it is told what else is used.
            timings: gets every stage up to the first piece, and the rest at the end of the answer's pieces.

        Raises:
            ApiError: whatever keeps the answer from starting.
        """
        limits = Limits(self._max_prompt_chars, self._engines.context)
        limits.check(asked)
        self._queue.check(asked.caller.name, asked.patience_s)
        user_key = asked.user.key if asked.user else None
        async with AsyncExitStack() as stack:
            self._limiter.count_body(counted, user_key, partial(limits.tokens, asked))
            personalization = await self._personalizer.resolve(asked, timings)
            await counted.let_in()
            start_s = time.perf_counter()
            recalled = await self._recall.messages(asked, personalization.profile, limits)
            if asked.history:
                timings.record("history", start_s)
            if recalled.reason:
                self._metrics.histories_left_out.inc()
            wanted = EngineRequest(
                request_id=f"{asked.id_prefix}-{request_id.get()}",
                model=personalization.model,
                messages=recalled.messages,
                sampling=asked.sampling,
                prompt_param=asked.prompt_param,
                stream=asked.comes_in_pieces
                or (asked.splittable and not limits.allow_whole(recalled.messages, asked.max_tokens)),
                prompt=asked.prompt,
                cache_salt=asked.cache_salt,
            )
            parts, caller = in_parts(wanted, self._queue.widest), asked.caller.name
            waiting = self._queue.place(caller, size=parts[0].sequences, patience_s=recalled.patience_s)
            place = await stack.enter_async_context(waiting)
            if place.waited_s:
                timings.record("queue", start_s, start_s + place.waited_s)
            candidates = may_speak(personalization, asked.personalize)
            counted.tokens = None  # the engine is at work: who leaves meanwhile is charged the estimate
            try:
                speaking, first = await self._first_served(stack, parts[0].request, candidates)
            except ApiError:
                counted.tokens = 0
                raise
            stream = AnswerStream(
                parts,
                first,
                place,
                wait=lambda size: self._queue.place(caller, size=size, begun=True),
                begin=lambda request: self._begin(replace(request, model=speaking.model)),
            )
            try:
                limits.check_answer(asked, stream.prompt_tokens)
                if stream.first_token_s is not None:
                    timings.record("engine_ttft", stream.sent_s, stream.first_token_s)
                    since_arrival_s = stream.first_token_s - timings.started_s
                    self._metrics.ttft.labels(speaking.level.value).observe(since_arrival_s)
                await stack.enter_async_context(stream)
                left, times = counted.headers(), self._metrics.inter_token
                yield Answer(wanted.request_id, speaking, recalled, stream, timings, times, left)
            finally:
                counted.tokens = stream.usage.get("total_tokens")

    @asynccontextmanager
    async def _begin(self, request: EngineRequest) -> AsyncIterator[EngineStream]:
        """Another part of an answer; the engine could serve its model a moment ago."""
        try:
            async with self._engine.generate(request) as stream:
                yield stream
        except AdapterMissing as error:
            raise Unavailable(f"the engine cannot serve this recipe any more: {error}", code="no_adapter") from error

    async def _first_served(
        self, stack: AsyncExitStack, wanted: EngineRequest, candidates: Iterable[Personalization]
    ) -> tuple[Personalization, EngineStream]:
        """The first candidate that the engine can serve, and its answer; the prompt is the same for all of them."""
        lacking: AdapterMissing | None = None
        for personalization in candidates:
            if lacking:
                self._metrics.fallbacks.inc()
            request = replace(wanted, model=personalization.model)
            try:
                return personalization, await stack.enter_async_context(self._engine.generate(request))
            except AdapterMissing as error:
                lacking = error
        if personalization.recipe is None:
            raise EngineFailed(f"the engine serves no model named {BASE_MODEL!r}: {lacking}") from lacking
        raise Unavailable(f"the engine cannot serve this user's recipe: {lacking}", code="no_adapter") from lacking
