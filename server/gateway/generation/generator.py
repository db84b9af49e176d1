"""One answer, from request to last token: who speaks, what the engine says, and what if it lacks the adapter."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from server.errors import EngineFailed, InvalidRequest, Unavailable
from server.gateway.engines.chat import AdapterMissing, EngineClient, EngineRequest
from server.gateway.engines.stream import EngineStream
from server.gateway.generation.personalizer import Personalization, Personalizer, fallen_back
from server.gateway.generation.recall import Conversation, Recall, conversation, most_tokens
from server.gateway.generation.timings import Timings
from server.gateway.http.requests import GenerateRequest, Personalize
from server.gateway.metrics import Metrics

WHOLE_TOKENS = 1024
"""Longest answer that the engine is asked for in one piece: while one is made, its silence looks like a hang."""

_SAMPLING = {"max_tokens", "temperature", "top_p", "stop", "seed"}


@dataclass(slots=True)
class Answer:
    """An answer under way.

    Attributes:
        id: of the request, in the engine's logs too.
        personalization: who speaks.
        stream: the engine's.
        timings: complete once `texts` has ended.
    """

    id: str
    personalization: Personalization
    stream: EngineStream
    timings: Timings

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of text; see `EngineStream.texts`."""
        async for text in self.stream.texts():
            yield text
        self.timings.record("engine", self.stream.sent_s)
        self.timings.finish()


class Generator:
    """Answers requests."""

    def __init__(self, personalizer: Personalizer, recall: Recall, engine: EngineClient, metrics: Metrics) -> None:
        self._personalizer = personalizer
        self._recall = recall
        self._engine = engine
        self._metrics = metrics

    @asynccontextmanager
    async def answer(self, request: GenerateRequest, timings: Timings, context: int | None) -> AsyncIterator[Answer]:
        """Start an answer and wait for its first piece; leaving before its end aborts it in the engine.

        Args:
            request: within the limits that are known before (`check_limits`).
            timings: gets every stage up to the first piece, and the rest from `Answer.texts`.
            context: the engine's, in tokens; None while no engine has told.

        Raises:
            ApiError: whatever keeps the answer from starting.
        """
        request_id = f"gen-{secrets.token_hex(12)}"
        personalization = await self._personalizer.resolve(request.user_id, request.personalize, timings)
        start_s = time.perf_counter()
        messages = await self._recall.messages(request, personalization.profile, context)
        if request.history:
            timings.record("history", start_s)
        wanted = EngineRequest(
            request_id=request_id,
            model=personalization.model,
            messages=messages,
            sampling=request.model_dump(include=_SAMPLING, exclude_none=True),
            prompt_param=request.conversation_param,
            stream=request.stream or not _surely_fits(messages, request.max_tokens, context),
        )
        async with AsyncExitStack() as stack:
            personalization, stream = await self._open(stack, request.personalize, wanted, personalization)
            _check_room(request, stream.prompt_tokens, context)
            if stream.first_token_s is not None:
                timings.record("engine_ttft", stream.sent_s, stream.first_token_s)
            yield Answer(request_id, personalization, stream, timings)

    async def _open(
        self, stack: AsyncExitStack, asked: Personalize, wanted: EngineRequest, personalization: Personalization
    ) -> tuple[Personalization, EngineStream]:
        """The engine's stream and who speaks in it: the base model, when the engine lacks the adapter."""
        try:
            return personalization, await stack.enter_async_context(self._engine.generate(wanted))
        except AdapterMissing as error:
            if personalization.recipe is None:
                raise EngineFailed(f"the engine serves no model named {wanted.model!r}: {error}") from error
            if asked is Personalize.MERGED:
                raise Unavailable(f"the engine cannot serve this user's recipe: {error}", code="no_adapter") from error
        self._metrics.fallbacks.inc()
        less = fallen_back(personalization)
        return await self._open(stack, asked, replace(wanted, model=less.model), less)


def check_limits(request: GenerateRequest, max_prompt_chars: int, context: int | None) -> None:
    """Refuse what is known to be too much before it reaches the engine.

    Args:
        request: well-formed.
        max_prompt_chars: longest conversation, in characters.
        context: the engine's, in tokens; None while no engine has told.

    Raises:
        InvalidRequest: naming the field.
    """
    chars = sum(len(message["content"]) for message in conversation(request))
    if chars > max_prompt_chars:
        param = request.conversation_param
        raise InvalidRequest(
            f"{param} has {chars} characters, at most {max_prompt_chars} are taken", param=param, code="prompt_too_long"
        )
    if context is not None and request.max_tokens >= context:
        raise InvalidRequest(
            f"max_tokens {request.max_tokens} leaves no room for a prompt: the model's context is {context} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )


def _surely_fits(messages: Conversation, max_tokens: int, context: int | None) -> bool:
    """Whether an answer can be made in one piece: short, and with room for it however the prompt is tokenised.

    Where that leaves doubt the answer is streamed, and refused at its first token.
    """
    if context is None or max_tokens > WHOLE_TOKENS:
        return False
    return most_tokens(messages) + max_tokens <= context


def _check_room(request: GenerateRequest, prompt_tokens: int | None, context: int | None) -> None:
    """Refuse `max_tokens` beyond what the prompt leaves; vLLM would silently generate fewer."""
    if prompt_tokens is None or context is None or prompt_tokens + request.max_tokens <= context:
        return
    raise InvalidRequest(
        f"max_tokens {request.max_tokens} is beyond what the prompt leaves: it has {prompt_tokens} tokens and the "
        f"model's context {context}. Ask for {context - prompt_tokens} at most",
        param="max_tokens",
        code="context_length_exceeded",
    )
