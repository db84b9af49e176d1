"""Sample checks that need an engine: chat template, number of tokens, and training budget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig
from server.errors import InvalidRequest, Unavailable
from server.gateway.engines.admin import Engines
from server.store.samples import Sample, decode_sample

MAX_CONCURRENT = 8  # engine requests in flight for one adapt request
MAX_CHECK_S = 10.0  # time after which no further batch of engine requests starts
MAX_ACCEPTED = 4096  # maximum number of remembered role sequences
A = TypeVar("A")


@dataclass
class SampleChecks:
    """Checks samples with an engine. If no engine answers, samples are accepted: the worker checks them again."""

    engines: Engines
    _accepted: set[str] = field(default_factory=set)  # role sequences

    async def check_template(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that the chat template refuses. Only roles matter, so each role sequence is checked once."""
        first: dict[str, int] = {}
        for place, sample in enumerate(samples):
            first.setdefault(_role_sequence(sample), place)
        places = [place for roles, place in first.items() if roles not in self._accepted]
        with suppress(Unavailable):
            async for place, reason in _ask_each(
                lambda place: self.engines.template_refusal(_conversation(samples[place])), places
            ):
                if reason is not None:
                    param = f"samples.{place}.input"
                    message = f"{param}: the model's chat template refuses these messages: {excerpt(reason, 300)}"
                    raise InvalidRequest(message, param=param, code="refused_by_template")
                if len(self._accepted) >= MAX_ACCEPTED:
                    self._accepted.clear()
                self._accepted.add(_role_sequence(samples[place]))

    async def check_lengths(self, raw_samples: Sequence[bytes]) -> None:
        """Refuse samples longer than the context. A token has at least one byte, so few samples need counting."""
        context = self.engines.context
        if context is None:
            return
        to_count = [place for place, raw in enumerate(raw_samples) if len(raw) > context]
        async for place, tokens in _ask_each(lambda place: self._count(raw_samples[place]), to_count):
            if tokens is not None and tokens > context:
                raise InvalidRequest(
                    f"samples.{place} has {tokens} tokens, the model's context is {context}: shorten it",
                    param=f"samples.{place}",
                    code="context_length_exceeded",
                )

    async def check_budget(self, config: AdaptConfig, raw_samples: Sequence[bytes]) -> None:
        """Refuse a job that would read more tokens than its configuration allows, which bounds the job's time."""

        def fits(steps: int) -> bool:
            return replace(config, steps=steps).tokens_read(lengths) <= config.max_tokens

        context = self.engines.context
        lengths = [min(len(raw), context or len(raw)) for raw in raw_samples]  # bytes, an upper bound on tokens
        if fits(config.steps):
            return
        async for place, tokens in _ask_each(lambda place: self._count(raw_samples[place]), range(len(raw_samples))):
            lengths[place] = lengths[place] if tokens is None else min(tokens, lengths[place])
        if fits(config.steps):
            return
        steps = next(filter(fits, range(config.steps - 1, 0, -1)), None)
        if steps is None:
            least = replace(config, steps=1).tokens_read(lengths)
            raise InvalidRequest(
                f"samples: {len(lengths)} samples with {sum(lengths)} tokens in all make a job that reads about "
                f"{least} tokens even in a single step, but at most {config.max_tokens} are allowed: send fewer",
                param="samples",
                code="job_too_large",
            )
        raise InvalidRequest(
            f"config.steps {config.steps} makes a job that reads about {config.tokens_read(lengths)} tokens over its "
            f"{len(lengths)} samples, but at most {config.max_tokens} are allowed: with {steps} steps it would fit",
            param="config.steps",
            code="job_too_large",
        )

    async def _count(self, raw: bytes) -> int | None:
        return await self.engines.count_tokens(_conversation(decode_sample(raw)))


async def _ask_each(ask: Callable[[int], Awaitable[A]], places: Sequence[int]) -> AsyncIterator[tuple[int, A]]:
    """Yield each place and its answer, in order, with bounded concurrency; stop early after `MAX_CHECK_S`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + MAX_CHECK_S
    for start in range(0, len(places), MAX_CONCURRENT):
        if loop.time() > deadline_s:
            return
        batch = places[start : start + MAX_CONCURRENT]
        for place, answer in zip(batch, await asyncio.gather(*map(ask, batch)), strict=True):
            yield place, answer


def _conversation(sample: Sample) -> list[dict[str, str]]:
    """Return the messages and the output as one conversation, as training renders it."""
    return [*sample.messages, {"role": "assistant", "content": sample.output}]


def _role_sequence(sample: Sample) -> str:
    """Return the first letter of each message's role."""
    return "".join(message["role"][0] for message in sample.messages)
