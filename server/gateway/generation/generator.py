"""One answer, from request to last token: `Generator.answer` is the loop that every generation passes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from server.engine_protocol import BASE_MODEL
from server.errors import ApiError, EngineFailed, Unavailable
from server.gateway.access.limiter import Limiter, RequestUsage
from server.gateway.access.queue import EngineLease, EngineQueue
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import AdapterMissing, EngineClient, EngineRequest
from server.gateway.engines.stream import EngineStream, Piece
from server.gateway.generation.answer_stream import AnswerStream, SubRequest, in_parts
from server.gateway.generation.personalizer import Personalization, Personalizer
from server.gateway.generation.prompts import PromptBuilder, UserPrompt
from server.gateway.generation.request import GenerationRequest, LengthLimits
from server.watching.logs import request_id


class Timings:
    """Where one request's milliseconds went.

    Attributes:
        started_s: when it arrived, by the performance counter.
        ms: durations by name, in the order in which they became known.
        gaps_s: the times between two pieces that the engine streamed.
    """

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.ms: dict[str, float] = {}
        self.gaps_s: list[float] = []

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
    """An answer in progress.

    Attributes:
        fallbacks: how many that are more personal the engine could not serve.
        waited_s: for its places in the engines.
        timings: complete once `pieces` has ended.
        limits: headers that say what the caller may still use.
    """

    id: str
    personalization: Personalization
    fallbacks: int
    prompt: UserPrompt
    waited_s: float
    stream: AnswerStream
    timings: Timings
    limits: Mapping[str, str]

    async def pieces(self) -> AsyncIterator[Piece]:
        """All that the engine sends; see `AnswerStream.pieces`."""
        stream, timings = self.stream, self.timings
        is_streamed, last_s = stream.first_token_s is not None, 0.0
        async for piece in stream.pieces():
            if is_streamed and piece[0]:
                now_s = time.perf_counter()
                if last_s:
                    timings.gaps_s.append(now_s - last_s)
                last_s = now_s
            yield piece
        timings.record("engine", stream.sent_s)
        timings.record("total", timings.started_s)


class Generator:
    """Answers requests; `max_prompt_chars` is the longest conversation, history included."""

    def __init__(
        self,
        personalizer: Personalizer,
        prompts: PromptBuilder,
        engine: EngineClient,
        engines: Engines,
        *,
        limiter: Limiter,
        queue: EngineQueue,
        max_prompt_chars: int,
    ) -> None:
        self._personalizer = personalizer
        self._prompts = prompts
        self._engine = engine
        self._engines = engines
        self._limiter = limiter
        self._queue = queue
        self._max_prompt_chars = max_prompt_chars

    @asynccontextmanager
    async def answer(self, request: GenerationRequest, usage: RequestUsage, timings: Timings) -> AsyncIterator[Answer]:
        """Start an answer and wait for its first piece; leaving the context early aborts it in the engine.

        The request is within its key's own limits; `usage` is told what else it uses, `timings` what takes how long.
        """
        limits = LengthLimits(self._max_prompt_chars, self._engines.context)
        limits.check(request)
        self._queue.check(request.caller.name, request.patience_s)
        self._limiter.count_body(usage, request.user, lambda: limits.tokens(request))
        with timings.stage("profile", counts=request.wants_profile):
            profile = await self._personalizer.profile(request)
        with timings.stage("recipe", counts=profile):
            candidates = self._personalizer.candidates(request, profile)
        await usage.within_limits()
        with timings.stage("history", counts=request.history):
            prompt = await self._prompts.build(request, profile, limits)
        parts = in_parts(_engine_request(request, prompt, limits), self._queue.widest)
        async with (
            self._queue.acquire(usage.caller.name, size=parts[0].sequences, patience_s=prompt.patience_s) as lease,
            self._first_served(parts, candidates, lease, usage) as (fallbacks, stream),
        ):
            limits.check_answer(request, stream.prompt_tokens)
            async with stream:
                yield Answer(
                    parts[0].request.request_id,
                    candidates[fallbacks],
                    fallbacks,
                    prompt,
                    lease.waited_s,
                    stream,
                    timings,
                    usage.headers(),
                )

    @asynccontextmanager
    async def _first_served(
        self,
        parts: Sequence[SubRequest],
        candidates: Sequence[Personalization],
        lease: EngineLease,
        usage: RequestUsage,
    ) -> AsyncIterator[tuple[int, AnswerStream]]:
        """Which candidate is the first that the engine can serve, and its answer; all have the same prompt."""
        usage.tokens = None  # the engine is at work: who leaves meanwhile is charged the estimate
        async with AsyncExitStack() as stack:
            try:
                number, first = await self._begin_first(stack, parts[0].request, candidates)
            except ApiError:
                usage.tokens = 0
                raise
            model, caller = candidates[number].model, usage.caller.name
            stream = AnswerStream(
                parts,
                first,
                lease,
                wait=lambda size: self._queue.acquire(caller, size=size, begun=True),
                begin=lambda request: self._begin_another(replace(request, model=model)),
            )
            try:
                yield number, stream
            finally:
                usage.tokens = stream.usage.get("total_tokens")

    async def _begin_first(
        self, stack: AsyncExitStack, request: EngineRequest, candidates: Sequence[Personalization]
    ) -> tuple[int, EngineStream]:
        lacking: AdapterMissing | None = None
        for number, candidate in enumerate(candidates):
            wanted = replace(request, model=candidate.model)
            try:
                return number, await stack.enter_async_context(self._engine.generate(wanted))
            except AdapterMissing as error:
                lacking = error
        if candidates[-1].recipe is None:
            raise EngineFailed(f"the engine serves no model named {BASE_MODEL!r}: {lacking}") from lacking
        raise Unavailable(f"the engine cannot serve this user's recipe: {lacking}", code="no_adapter") from lacking

    @asynccontextmanager
    async def _begin_another(self, request: EngineRequest) -> AsyncIterator[EngineStream]:
        """Another part of an answer; the engine could serve its model a moment ago."""
        try:
            async with self._engine.generate(request) as stream:
                yield stream
        except AdapterMissing as error:
            raise Unavailable(f"the engine cannot serve this recipe any more: {error}", code="no_adapter") from error


def _engine_request(request: GenerationRequest, prompt: UserPrompt, limits: LengthLimits) -> EngineRequest:
    return EngineRequest(
        request_id=f"{request.id_prefix}-{request_id.get()}",
        model=BASE_MODEL,  # each candidate puts its own
        messages=prompt.messages,
        sampling=request.sampling,
        prompt_param=request.prompt_param,
        stream=request.comes_in_pieces
        or (request.splittable and not limits.allow_whole(prompt.messages, request.max_tokens)),
        prompt=request.prompt,
        cache_salt=request.cache_salt,
    )
