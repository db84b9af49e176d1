"""What only the engine can say about samples: whether the chat template accepts them, and how long they are."""

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

AT_A_TIME = 8  # concurrent requests to the engine for one adapt request
PATIENCE_S = 10.0  # after that no further batch of them is begun
MOST_SHAPES = 4096  # most sequences of roles that are remembered
A = TypeVar("A")


@dataclass
class SampleChecks:
    """Asks the engine about samples. If it cannot say, they are accepted: the worker checks again."""

    engines: Engines
    _accepted: set[str] = field(default_factory=set)  # sequences of roles

    async def check_template(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that the chat template does not accept. It goes by roles, so each sequence is asked once."""
        first: dict[str, int] = {}
        for place, sample in enumerate(samples):
            first.setdefault(_roles(sample), place)
        places = [place for roles, place in first.items() if roles not in self._accepted]
        with suppress(Unavailable):
            async for place, reason in _asked(
                lambda place: self.engines.template_refusal(_answered(samples[place])), places
            ):
                if reason is not None:
                    param, told = f"samples.{place}.input", excerpt(reason, 300)
                    message = f"{param}: the model's chat template refuses these messages: {told}"
                    raise InvalidRequest(message, param=param, code="refused_by_template")
                if len(self._accepted) >= MOST_SHAPES:
                    self._accepted.clear()
                self._accepted.add(_roles(samples[place]))

    async def check_lengths(self, raw_samples: Sequence[bytes]) -> None:
        """Refuse samples longer than the context; a token is at least a byte, so most need no counting."""
        context = self.engines.context
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
        """Refuse a job that would read more tokens than its configuration allows: a job's time must be bounded."""

        def fits(steps: int) -> bool:
            return replace(config, steps=steps).tokens_read(lengths) <= config.max_tokens

        context = self.engines.context
        lengths = [min(len(raw), context or len(raw)) for raw in raw_samples]  # in bytes: no fewer than tokens
        if fits(config.steps):
            return
        async for place, tokens in _asked(lambda place: self._count(raw_samples[place]), range(len(raw_samples))):
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
        return await self.engines.count_tokens(_answered(decode_sample(raw)))


async def _asked(ask: Callable[[int], Awaitable[A]], places: Sequence[int]) -> AsyncIterator[tuple[int, A]]:
    """Each place with the answer about it, in order, a few asked at a time; ends early after `PATIENCE_S`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + PATIENCE_S
    for start in range(0, len(places), AT_A_TIME):
        if loop.time() > deadline_s:
            return
        batch = places[start : start + AT_A_TIME]
        for place, answer in zip(batch, await asyncio.gather(*map(ask, batch)), strict=True):
            yield place, answer


def _answered(sample: Sample) -> list[dict[str, str]]:
    """The whole conversation, as training renders it."""
    return [*sample.messages, {"role": "assistant", "content": sample.output}]


def _roles(sample: Sample) -> str:
    """One letter for each message."""
    return "".join(message["role"][0] for message in sample.messages)
