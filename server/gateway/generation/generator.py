"""Generate one answer, from request to last token: every route calls `Generator.answer`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from server.engine_protocol import BASE_MODEL
from server.errors import ApiError, EngineFailed, Unavailable
from server.gateway.access.limiter import Limiter, RequestUsage
from server.gateway.access.queue import EngineLease, EngineQueue
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import AdapterMissing, EngineClient, EngineRequest, EngineStream, Piece
from server.gateway.generation.answer_ids import answer_id
from server.gateway.generation.answer_stream import AnswerStream, SubRequest, split_request
from server.gateway.generation.personalizer import Personalization, Personalizer
from server.gateway.generation.prompts import PromptBuilder, UserPrompt
from server.gateway.generation.request import GenerationRequest, LengthLimits
from server.observability.logs import request_id
from server.store.tenants.user_key import User


@dataclass(slots=True)
class Timings:
    started_s: float  # arrival time by the performance counter
    observe_gap_s: Callable[[float], None]  # called with the seconds between two streamed texts
    ms: dict[str, float] = field(default_factory=dict)  # by stage name, in order of recording

    def record(self, name: str, duration_s: float) -> None:
        self.ms[name] = round(duration_s * 1000, 3)

    @contextmanager
    def stage(self, name: str, *, counts: object = True) -> Iterator[None]:
        """Record the duration of the block under `name`, if `counts` is true and the block does not raise."""
        since_s = time.perf_counter()
        yield
        if counts:
            self.record(name, time.perf_counter() - since_s)

    def header(self) -> str:
        return ", ".join(f"{name};dur={ms}" for name, ms in self.ms.items())


@dataclass(frozen=True, slots=True)
class Answer:
    request: GenerationRequest
    sampling: Mapping[str, Any]  # the request's, with the defaults of the engines
    user: User | None  # as stored, maybe under another secret than the request's
    id: str  # the request's, for logs
    public_id: str  # for the client: `id`, or an id that feedback can name (`answer_ids.py`)
    personalization: Personalization
    fallbacks: int  # number of more personal candidates the engine could not serve
    prompt: UserPrompt
    stream: AnswerStream
    timings: Timings  # complete when `pieces` has ended
    limits: Mapping[str, str]  # response headers with the caller's remaining limits
    epoch: str  # the user's when the profile was read

    async def pieces(self) -> AsyncIterator[Piece]:
        stream, timings = self.stream, self.timings
        is_streamed = stream.first.first_token_s is not None
        last_text_s: float | None = None
        async for text, value in stream.pieces():
            if is_streamed and text:
                now_s = time.perf_counter()
                if last_text_s is not None:
                    timings.observe_gap_s(now_s - last_text_s)
                last_text_s = now_s
            yield text, value
        ended_s = time.perf_counter()
        timings.record("engine", ended_s - stream.first.sent_s)
        timings.record("total", ended_s - timings.started_s)


class Recorder(Protocol):
    """What is told of each answer."""

    def begun(self, answer: Answer) -> None:
        """An engine has begun the answer, or has sent it whole."""

    def ended(self, answer: Answer) -> None:
        """The answer is complete: no error, and the client has not left."""


@dataclass(frozen=True, slots=True, eq=False)
class Generator:
    personalizer: Personalizer
    prompts: PromptBuilder
    engine: EngineClient
    engines: Engines
    recorder: Recorder
    limiter: Limiter
    queue: EngineQueue
    max_prompt_chars: int  # maximum length of a conversation with its history, in characters
    default_max_tokens: int  # maximum length of an answer whose request sets none

    @asynccontextmanager
    async def answer(self, request: GenerationRequest, usage: RequestUsage, timings: Timings) -> AsyncIterator[Answer]:
        """Start an answer and wait for its first piece; leaving the context early aborts it in the engine.

        The caller has already checked the limits of the API key; `usage` records what the request uses from here on.
        """
        limits = LengthLimits(self.max_prompt_chars, self.engines.context, self.default_max_tokens)
        limits.check(request)
        self.queue.check(request.caller.name, request.patience_s)
        self.limiter.count_body(usage, request.user, lambda: limits.estimate_tokens(request))
        with timings.stage("profile", counts=request.wants_profile):
            user, profile, epoch = await self.personalizer.profile(request)
        with timings.stage("recipe", counts=profile):
            candidates = self.personalizer.candidates(request, user, profile)
        await usage.within_limits()
        with timings.stage("history", counts=request.history):
            prompt = await self.prompts.build(request, user, profile, limits)
        # An engine refuses a length above its context.
        length = {} if limits.context_tokens is None else {"max_tokens": limits.answer_tokens(request)}
        sampling = {**length, **self.engines.sampling, **request.sampling}
        engine_request = _engine_request(request, prompt, sampling, limits)
        parts = split_request(engine_request, self.queue.widest)
        async with (
            self.queue.acquire(usage.caller.name, size=parts[0].sequences, patience_s=prompt.patience_s) as lease,
            self._start_answer(parts, candidates, lease, usage) as (skipped, stream),
        ):
            limits.check_answer(request, stream.first.prompt_tokens)
            if lease.waited_s:
                timings.record("queue", lease.waited_s)
            async with stream:
                served, own_id = candidates[skipped], engine_request.request_id
                answer = Answer(
                    request,
                    sampling,
                    user,
                    own_id,
                    _public_id(request, user, epoch, own_id, served),
                    served,
                    fallbacks=skipped,
                    prompt=prompt,
                    stream=stream,
                    timings=timings,
                    limits=usage.headers(),
                    epoch=epoch,
                )
                self.recorder.begun(answer)
                yield answer
        self.recorder.ended(answer)

    @asynccontextmanager
    async def _start_answer(
        self,
        parts: Sequence[SubRequest],
        candidates: Sequence[Personalization],
        lease: EngineLease,
        usage: RequestUsage,
    ) -> AsyncIterator[tuple[int, AnswerStream]]:
        """Start the answer with its first part; yield the number of skipped candidates and the answer."""
        usage.tokens = None  # a client that disconnects before the engine reports its usage is charged the estimate
        async with AsyncExitStack() as stack:
            try:
                skipped, first = await self._start_part(stack, parts[0].request, candidates)
            except ApiError:
                usage.tokens = 0  # the engine generated nothing
                raise
            served = candidates[skipped]
            stream = AnswerStream(
                parts,
                first,
                lease,
                wait=lambda size: self.queue.acquire(usage.caller.name, size=size, begun=True),
                begin=lambda part_stack, request: self._start_part(part_stack, request, [served]),
            )
            try:
                yield skipped, stream
            finally:
                usage.tokens = stream.usage.get("total_tokens")

    async def _start_part(
        self, stack: AsyncExitStack, request: EngineRequest, candidates: Sequence[Personalization]
    ) -> tuple[int, EngineStream]:
        """Return the number of candidates that the engine cannot serve, and the stream of the first that it can."""
        missing: AdapterMissing | None = None
        for skipped, candidate in enumerate(candidates):
            attempt = replace(request, model=candidate.model, phrases=candidate.phrases)
            try:
                return skipped, await stack.enter_async_context(self.engine.generate(attempt))
            except AdapterMissing as error:
                missing = error
        if candidates[-1].recipe is None:
            raise EngineFailed(f"the engine serves no model named {BASE_MODEL!r}: {missing}") from missing
        raise Unavailable(f"the engine cannot serve this user's recipe: {missing}", code="no_adapter") from missing


def _public_id(
    request: GenerationRequest, user: User | None, epoch: str, request_id: str, served: Personalization
) -> str:
    if user is None or not request.wants_profile:
        return request_id
    recipe = served.public_recipe
    return answer_id(request.users, user, epoch, request_id, level=served.level, arm=served.arm, recipe=recipe)


def _engine_request(
    request: GenerationRequest, prompt: UserPrompt, sampling: Mapping[str, Any], limits: LengthLimits
) -> EngineRequest:
    # A stream can be refused at its first token, and releases the places of several answers one by one; but the engine
    # parses tool calls better in one piece.
    streamed = request.sequences > 1 or not limits.allow_whole(request, prompt.messages)
    return EngineRequest(
        request_id=f"{request.id_prefix}-{request_id.get()}",
        model=BASE_MODEL,  # replaced by each candidate's model
        messages=prompt.messages,
        sampling=sampling,
        prompt_param=request.prompt_param,
        stream=request.stream or (streamed and "tools" not in sampling),
        prompt=request.prompt,
        cache_salt=request.users.cache_salt,
    )
