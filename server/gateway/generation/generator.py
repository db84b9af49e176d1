"""One answer, from request to last token: `Generator.answer` is the loop that every generation passes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from server.engine_protocol import BASE_MODEL
from server.errors import ApiError, EngineFailed, Unavailable
from server.gateway.access.limiter import Limiter, RequestUsage
from server.gateway.access.queue import EngineLease, EngineQueue
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import AdapterMissing, EngineClient, EngineRequest, EngineStream, Piece
from server.gateway.generation.answer_stream import AnswerStream, SubRequest, in_parts
from server.gateway.generation.personalizer import Personalization, Personalizer
from server.gateway.generation.prompts import PromptBuilder, UserPrompt
from server.gateway.generation.request import GenerationRequest, LengthLimits
from server.watching.logs import request_id


class Timings:
    """Where one request's milliseconds went."""

    def __init__(self, started_s: float, gap: Callable[[float], None]) -> None:
        self.started_s = started_s  # when it arrived, by the performance counter
        self.gap = gap  # called with the seconds between two pieces that the engine streamed
        self.ms: dict[str, float] = {}  # by name, in the order in which they became known

    def record(self, name: str, since_s: float, until_s: float | None = None) -> None:
        """Set `name` to the time from `since_s` to `until_s` (default: now)."""
        until_s = time.perf_counter() if until_s is None else until_s
        self.ms[name] = round((until_s - since_s) * 1000, 3)

    @contextmanager
    def stage(self, name: str, *, counts: object = True) -> Iterator[None]:
        """Set `name` to the time that the block takes, if it `counts` and does not fail."""
        since_s = time.perf_counter()
        yield
        if counts:
            self.record(name, since_s)

    def header(self) -> str:
        """The value of a `Server-Timing` header."""
        return ", ".join(f"{name};dur={ms}" for name, ms in self.ms.items())


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in progress."""

    id: str
    personalization: Personalization
    fallbacks: int  # how many more personal ones the engine could not serve
    prompt: UserPrompt
    stream: AnswerStream
    timings: Timings  # complete once `pieces` has ended
    limits: Mapping[str, str]  # headers that say what the caller may still use

    async def pieces(self) -> AsyncIterator[Piece]:
        """All that the engine sends; see `AnswerStream.pieces`."""
        stream, timings = self.stream, self.timings
        is_streamed, last_s = stream.first.first_token_s is not None, 0.0
        async for piece in stream.pieces():
            if is_streamed and piece[0]:
                now_s = time.perf_counter()
                if last_s:
                    timings.gap(now_s - last_s)
                last_s = now_s
            yield piece
        timings.record("engine", stream.first.sent_s)
        timings.record("total", timings.started_s)


@dataclass(frozen=True, slots=True, eq=False)
class Generator:
    """Answers requests."""

    personalizer: Personalizer
    prompts: PromptBuilder
    engine: EngineClient
    engines: Engines
    limiter: Limiter
    queue: EngineQueue
    max_prompt_chars: int  # of the longest conversation, history included

    @asynccontextmanager
    async def answer(self, request: GenerationRequest, usage: RequestUsage, timings: Timings) -> AsyncIterator[Answer]:
        """Start an answer and wait for its first piece; leaving the context early aborts it in the engine.

        The request is within its key's own limits; `usage` is told what else it uses, `timings` what takes how long.
        """
        limits = LengthLimits(self.max_prompt_chars, self.engines.context)
        limits.check(request)
        self.queue.check(request.caller.name, request.patience_s)
        self.limiter.count_body(usage, request.user, lambda: limits.tokens(request))
        with timings.stage("profile", counts=request.wants_profile):
            profile = await self.personalizer.profile(request)
        with timings.stage("recipe", counts=profile):
            candidates = self.personalizer.candidates(request, profile)
        await usage.within_limits()
        with timings.stage("history", counts=request.history):
            prompt = await self.prompts.build(request, profile, limits)
        parts = in_parts(_engine_request(request, prompt, limits), self.queue.widest)
        async with (
            self.queue.acquire(usage.caller.name, size=parts[0].sequences, patience_s=prompt.patience_s) as lease,
            self._first_served(parts, candidates, lease, usage) as (fallbacks, stream),
        ):
            limits.check_answer(request, stream.first.prompt_tokens)
            if lease.waited_s:
                timings.record("queue", 0.0, lease.waited_s)
            name, who = parts[0].request.request_id, candidates[fallbacks]
            async with stream:
                yield Answer(name, who, fallbacks, prompt, stream, timings, usage.headers())

    @asynccontextmanager
    async def _first_served(
        self,
        parts: Sequence[SubRequest],
        candidates: Sequence[Personalization],
        lease: EngineLease,
        usage: RequestUsage,
    ) -> AsyncIterator[tuple[int, AnswerStream]]:
        """Which candidate is the first that the engine can serve, and its answer; all have the same prompt."""
        stream: AnswerStream | None = None
        usage.tokens = None  # the engine is at work: a client that leaves meanwhile is charged the estimate
        try:
            async with self._begin(parts[0].request, candidates) as (number, first):
                stream = AnswerStream(
                    parts,
                    first,
                    lease,
                    wait=lambda size: self.queue.acquire(usage.caller.name, size=size, begun=True),
                    begin=lambda request: self._begin(request, candidates[number : number + 1]),
                )
                yield number, stream
        except ApiError:
            if stream is None:
                usage.tokens = 0
            raise
        finally:
            if stream is not None:
                usage.tokens = stream.usage.get("total_tokens")

    @asynccontextmanager
    async def _begin(
        self, request: EngineRequest, candidates: Sequence[Personalization]
    ) -> AsyncIterator[tuple[int, EngineStream]]:
        """The first candidate that the engine can serve, by its number, and what the engine says to the request."""
        lacking: AdapterMissing | None = None
        async with AsyncExitStack() as stack:
            for number, candidate in enumerate(candidates):
                wanted = replace(request, model=candidate.model)
                try:
                    stream = await stack.enter_async_context(self.engine.generate(wanted))
                except AdapterMissing as error:
                    lacking = error
                else:
                    yield number, stream
                    return
        if candidates[-1].recipe is None:
            raise EngineFailed(f"the engine serves no model named {BASE_MODEL!r}: {lacking}") from lacking
        raise Unavailable(f"the engine cannot serve this user's recipe: {lacking}", code="no_adapter") from lacking


def _engine_request(request: GenerationRequest, prompt: UserPrompt, limits: LengthLimits) -> EngineRequest:
    # Of several answers the places come back one by one. The engine parses calls of tools better in a whole answer.
    in_pieces = request.stream or (request.sequences > 1 and "tools" not in request.sampling)
    return EngineRequest(
        request_id=f"{request.id_prefix}-{request_id.get()}",
        model=BASE_MODEL,  # each candidate puts its own
        messages=prompt.messages,
        sampling=request.sampling,
        prompt_param=request.prompt_param,
        stream=in_pieces or (request.splittable and not limits.allow_whole(prompt.messages, request.max_tokens)),
        prompt=request.prompt,
        cache_salt=request.cache_salt,
    )
