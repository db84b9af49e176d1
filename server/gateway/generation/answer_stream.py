"""The answer to one request, which goes to the engines in parts of a few sequences if it asks for many.

A whole one would wait until enough places are free at once, and keep them until its last sequence ends. Parts wait one
after another, and every sequence that ends gives its place back. Clients see one answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

from server.gateway.access.queue import EngineLease
from server.gateway.engines.chat import EngineRequest, EngineStream, Piece
from server.gateway.generation.request import prompts_of

_AHEAD = 64  # most chunks that are read ahead of a client
_GREEDY = 1e-5  # below this temperature vLLM samples nothing


@dataclass(frozen=True, slots=True)
class SubRequest:
    """One of an answer's requests to the engines."""

    request: EngineRequest
    first: int  # index of the first of its choices in the whole answer
    sequences: int  # how many choices it has
    brings_prompt: bool = True  # its prompt's tokens count; only once where several parts have the same prompt


def in_parts(request: EngineRequest, most: int | None) -> list[SubRequest]:
    """A request in parts of at most so many sequences; None for any number.

    The choices are those that the whole would have: the engine adds to the seed a choice's number among its prompt's,
    so a part begins with a seed further on.
    """
    prompts, n = prompts_of(request.prompt), int(request.sampling.get("n", 1))
    if most is None or len(prompts) * n <= most:
        return [SubRequest(request, 0, len(prompts) * n)]
    if n > 1 and request.sampling.get("temperature", 1) < _GREEDY:
        return [SubRequest(request, 0, most)]  # the engine refuses it, whatever its width: it samples nothing
    parts: list[SubRequest] = []

    def add(first: int, sequences: int, *, brings_prompt: bool = True, **changed: Any) -> None:
        name = f"{request.request_id}-{len(parts)}" if parts else request.request_id
        parts.append(SubRequest(replace(request, request_id=name, **changed), first, sequences, brings_prompt))

    if n <= most:
        for start in range(0, len(prompts), most // n):
            some = prompts[start : start + most // n]
            add(start * n, len(some) * n, prompt=some)
        return parts
    for number, prompt in enumerate(prompts):
        for start in range(0, n, most):
            size = min(most, n - start)
            sampling = {**request.sampling, "n": size}
            if "seed" in sampling:
                sampling["seed"] = (sampling["seed"] + start + (1 << 63)) % (1 << 64) - (1 << 63)
            add(number * n + start, size, brings_prompt=not start, sampling=sampling, prompt=prompt)
    return parts


@dataclass(eq=False)
class AnswerStream:
    """An answer in progress: iterate `pieces`; everything is known when that ends.

    A context manager: at its end parts that are still in progress are aborted, as they are when one of them fails.
    """

    parts: Sequence[SubRequest]
    first: EngineStream  # of the first part, which has begun
    lease: EngineLease  # the first part's
    wait: Callable[[int], AbstractAsyncContextManager[EngineLease]]  # for places for so many sequences of another part
    begin: Callable[[EngineRequest], AbstractAsyncContextManager[tuple[int, EngineStream]]]  # with another part

    def __post_init__(self) -> None:
        self._streams = [(self.parts[0], self.first)]
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if len(self.parts) > 1:
            self._read = asyncio.Queue[tuple[SubRequest, Piece] | Exception | None](_AHEAD)
            self._reading = asyncio.create_task(self._read_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reading:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    @property
    def usage(self) -> dict[str, int]:
        """Token counts of all parts, as far as the engine reported them."""
        reported = [(part, stream.usage) for part, stream in self._streams if stream.usage]
        if not reported:
            return {}
        prompt = sum(usage["prompt_tokens"] for part, usage in reported if part.brings_prompt)
        completion = sum(usage["completion_tokens"] for _, usage in reported)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def pieces(self) -> AsyncIterator[Piece]:
        """All that the engines say: chunks, or the whole answer; iterating raises as `EngineStream` does."""
        return self._joined() if self._reading else self._releasing(self.first, self.lease)

    async def _joined(self) -> AsyncIterator[Piece]:
        last: list[dict[str, Any]] = []  # whole answers, or what follows a stream's last choice
        created: Any = None
        while (read := await self._read.get()) is not None:
            if isinstance(read, Exception):
                raise read
            part, (text, value) = read
            created = created or value.get("created")
            value["created"] = created
            for choice in value["choices"]:
                choice["index"] += part.first
            if self.first.first_token_s is not None and value["choices"]:
                yield text, value
            else:
                last.append(value)
        if last:
            choices = sorted((choice for value in last for choice in value["choices"]), key=lambda one: one["index"])
            yield "", last[0] | {"choices": choices, "usage": self.usage or None}

    async def _read_all(self) -> None:
        try:
            async with AsyncExitStack() as leases, asyncio.TaskGroup() as reading:
                reading.create_task(self._read_part(self.parts[0], self.first, self.lease))
                for part in self.parts[1:]:
                    lease = await leases.enter_async_context(self.wait(part.sequences))
                    reading.create_task(self._begin_part(part, lease))
        except* Exception as errors:
            await self._read.put(errors.exceptions[0])  # no group: tasks are not nested
        else:
            await self._read.put(None)

    async def _begin_part(self, part: SubRequest, lease: EngineLease) -> None:
        async with self.begin(part.request) as (_, stream):
            self._streams.append((part, stream))
            await self._read_part(part, stream, lease)

    async def _read_part(self, part: SubRequest, stream: EngineStream, lease: EngineLease) -> None:
        async for piece in self._releasing(stream, lease):
            await self._read.put((part, piece))

    async def _releasing(self, stream: EngineStream, lease: EngineLease) -> AsyncIterator[Piece]:
        """A part's pieces; a sequence that has ended gives its place back."""
        ended: set[int] = set()
        async for piece in stream:
            for choice in piece[1]["choices"]:
                if (
                    self.first.first_token_s is not None
                    and choice.get("finish_reason")
                    and choice["index"] not in ended
                ):
                    ended.add(choice["index"])
                    lease.release(1)
            yield piece
        lease.release()
