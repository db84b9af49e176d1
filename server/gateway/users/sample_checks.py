"""What only the engine can say about samples: whether the chat template accepts them, and how long they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig
from server.errors import InvalidRequest, Unavailable
from server.store.samples import Sample, decode_sample

AT_A_TIME = 8
"""Concurrent requests to the engine for one adapt request."""

PATIENCE_S = 10.0
"""After that no further batch of them is begun."""

MOST_SHAPES = 4096
"""Most sequences of roles that are remembered."""

T = TypeVar("T")
A = TypeVar("A")


class Tokenizer(Protocol):
    """What is used of `server.gateway.engines.admin.TokenizerClient`."""

    async def refusal(self, messages: list[dict[str, str]]) -> str | None: ...

    async def count(self, messages: list[dict[str, str]]) -> int | None: ...


class SampleChecks:
    """Asks the engine about samples. If it cannot say, they are accepted: the worker checks again.

    Args:
        context: the model's, in tokens; None while it is unknown.
    """

    def __init__(self, tokenizer: Tokenizer, context: Callable[[], int | None]) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._accepted: set[str] = set()

    async def check_template(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that the chat template does not accept, by the first of them.

        A template goes by the roles and their order, so each sequence of them is checked once.
        """
        first: dict[str, int] = {}
        for place, sample in enumerate(samples):
            first.setdefault(_roles(sample), place)
        places = [place for roles, place in first.items() if roles not in self._accepted]
        try:
            async for place, reason in _asked(lambda place: self._tokenizer.refusal(_answered(samples[place])), places):
                if reason is not None:
                    raise InvalidRequest(
                        f"samples.{place}.input: the model's chat template refuses these messages: "
                        f"{excerpt(reason, 300)}",
                        param=f"samples.{place}.input",
                        code="refused_by_template",
                    )
                if len(self._accepted) >= MOST_SHAPES:
                    self._accepted.clear()
                self._accepted.add(_roles(samples[place]))
        except Unavailable:
            return

    async def check_lengths(self, raw_samples: Sequence[bytes]) -> None:
        """Refuse samples longer than the context; a token is at least a byte, so most need no counting."""
        context = self._context()
        if context is None:
            return
        doubtful = [place for place, raw in enumerate(raw_samples) if len(raw) > context]
        async for place, tokens in _asked(lambda place: self._count(raw_samples[place]), doubtful):
            if tokens is not None and tokens > context:
                raise InvalidRequest(
                    f"samples.{place} has {tokens} tokens, the model's context is {context}: shorten it",
                    param=f"samples.{place}",
                    code="context_length_exceeded",
                )

    async def check_budget(self, config: AdaptConfig, raw_samples: Sequence[bytes]) -> None:
        """Refuse a job that would read more tokens than its configuration allows: a job's time must be bounded.

        Tokens are counted only if the bytes, which are more, would be too many.
        """
        context = self._context()
        lengths = [min(len(raw), context or len(raw)) for raw in raw_samples]
        if config.tokens_read(lengths) > config.max_tokens:
            places = range(len(raw_samples))
            async for place, tokens in _asked(lambda place: self._count(raw_samples[place]), places):
                lengths[place] = lengths[place] if tokens is None else min(tokens, lengths[place])
        check_budget(config, lengths)

    async def _count(self, raw: bytes) -> int | None:
        return await self._tokenizer.count(_answered(decode_sample(raw)))


def check_budget(config: AdaptConfig, lengths: Sequence[int]) -> None:
    """Refuse a job over so many samples of these lengths in tokens, naming what to lower.

    Raises:
        InvalidRequest: naming `config.steps`, or `samples` if no number of steps would fit.
    """
    tokens, budget = config.tokens_read(lengths), config.max_tokens
    if tokens <= budget:
        return
    fitting = (steps for steps in range(config.steps - 1, 0, -1) if _of(config, steps, lengths) <= budget)
    steps = next(fitting, None)
    if steps is None:
        raise InvalidRequest(
            f"samples: {len(lengths)} samples with {sum(lengths)} tokens in all make a job that reads about "
            f"{_of(config, 1, lengths)} tokens even in a single step, but at most {budget} are allowed: send fewer",
            param="samples",
            code="job_too_large",
        )
    raise InvalidRequest(
        f"config.steps {config.steps} makes a job that reads about {tokens} tokens over its {len(lengths)} samples, "
        f"but at most {budget} are allowed: with {steps} steps it would fit",
        param="config.steps",
        code="job_too_large",
    )


def _of(config: AdaptConfig, steps: int, lengths: Sequence[int]) -> int:
    return replace(config, steps=steps).tokens_read(lengths)


async def _asked(ask: Callable[[T], Awaitable[A]], things: Sequence[T]) -> AsyncIterator[tuple[T, A]]:
    """Each thing with the answer to it, in order, a few asked at a time; ends early after `PATIENCE_S`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + PATIENCE_S
    for start in range(0, len(things), AT_A_TIME):
        if loop.time() > deadline_s:
            return
        batch = things[start : start + AT_A_TIME]
        for thing, answer in zip(batch, await asyncio.gather(*map(ask, batch)), strict=True):
            yield thing, answer


def _answered(sample: Sample) -> list[dict[str, str]]:
    """The whole conversation, as training renders it."""
    return [*sample.messages, {"role": "assistant", "content": sample.output}]


def _roles(sample: Sample) -> str:
    """The roles of a sample's messages in order, one letter each."""
    return "".join(message["role"][0] for message in sample.messages)
