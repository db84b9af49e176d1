"""The answer to one request; a request for many sequences is split into several engine requests.

An unsplit request would wait until all its places are free at once and hold them until its last sequence ends. Parts
queue one after another, and each finished sequence releases its place. The client sees a single answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

from server.gateway.access.queue import EngineLease
from server.gateway.engines.chat import EngineRequest, EngineStream, Piece
from server.gateway.generation.request import prompts_of

_MAX_BUFFERED = 64  # pieces read before the client takes them
_GREEDY = 1e-5  # vLLM decodes greedily below this temperature


@dataclass(frozen=True, slots=True)
class SubRequest:
    request: EngineRequest
    first: int  # index of its first choice in the whole answer
    sequences: int  # number of choices
    counts_prompt: bool = True  # whether to count its prompt tokens; parts that share a prompt count them once


def split_request(request: EngineRequest, max_sequences: int | None) -> list[SubRequest]:
    """Split a request into parts of at most `max_sequences` sequences; None means no limit.

    The parts produce the same choices as the whole request. The engine seeds each choice with the request's seed plus
    the choice's number within its prompt, so later parts get an increased seed.
    """
    prompts, n = prompts_of(request.prompt), int(request.sampling.get("n", 1))
    if max_sequences is None or len(prompts) * n <= max_sequences:
        return [SubRequest(request, 0, len(prompts) * n)]
    if n > 1 and request.sampling.get("temperature", 1) < _GREEDY:
        return [SubRequest(request, 0, max_sequences)]  # the engine refuses n > 1 with greedy decoding, at any size
    parts: list[SubRequest] = []

    def add(first: int, sequences: int, *, counts_prompt: bool = True, **changed: Any) -> None:
        name = f"{request.request_id}-{len(parts)}" if parts else request.request_id
        parts.append(SubRequest(replace(request, request_id=name, **changed), first, sequences, counts_prompt))

    if n <= max_sequences:
        for start in range(0, len(prompts), max_sequences // n):
            chunk = prompts[start : start + max_sequences // n]
            add(start * n, len(chunk) * n, prompt=chunk)
        return parts
    for number, prompt in enumerate(prompts):
        for start in range(0, n, max_sequences):
            size = min(max_sequences, n - start)
            sampling = {**request.sampling, "n": size}
            if "seed" in sampling:
                sampling["seed"] = (sampling["seed"] + start + (1 << 63)) % (1 << 64) - (1 << 63)
            add(number * n + start, size, counts_prompt=not start, sampling=sampling, prompt=prompt)
    return parts


@dataclass(eq=False)
class AnswerStream:
    """An answer in progress: iterate `pieces`; all attributes are complete when the iteration ends.

    Leaving the context aborts the parts that are still running; so does the failure of any part.
    """

    parts: Sequence[SubRequest]
    first: EngineStream  # stream of the first part, already started
    lease: EngineLease  # lease of the first part
    wait: Callable[[int], AbstractAsyncContextManager[EngineLease]]  # acquire places for another part
    begin: Callable[[AsyncExitStack, EngineRequest], Awaitable[tuple[int, EngineStream]]]  # start another part

    def __post_init__(self) -> None:
        self._streams = [(self.parts[0], self.first)]
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if len(self.parts) > 1:
            self._buffer = asyncio.Queue[tuple[SubRequest, Piece] | Exception | None](_MAX_BUFFERED)
            self._reader = asyncio.create_task(self._read_all_parts())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    @property
    def moved(self) -> int:
        return sum(stream.moved for _, stream in self._streams)

    @property
    def usage(self) -> dict[str, int]:
        reported = [(part, stream.usage) for part, stream in self._streams if stream.usage]
        if not reported:
            return {}
        prompt = sum(usage["prompt_tokens"] for part, usage in reported if part.counts_prompt)
        completion = sum(usage["completion_tokens"] for _, usage in reported)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def pieces(self) -> AsyncIterator[Piece]:
        """Return the engines' chunks, or the whole answer as one piece; raises the errors of `EngineStream`."""
        return self._merged_pieces() if self._reader else self._release_places(self.first, self.lease)

    async def _merged_pieces(self) -> AsyncIterator[Piece]:
        last: list[dict[str, Any]] = []  # whole answers, or each stream's final chunk without choices
        created: Any = None
        while (read := await self._buffer.get()) is not None:
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

    async def _read_all_parts(self) -> None:
        try:
            async with AsyncExitStack() as leases, asyncio.TaskGroup() as reading:
                reading.create_task(self._read_part(self.parts[0], self.first, self.lease))
                for part in self.parts[1:]:
                    lease = await leases.enter_async_context(self.wait(part.sequences))
                    reading.create_task(self._begin_part(part, lease))
        except* Exception as errors:
            await self._buffer.put(errors.exceptions[0])  # never a nested group: the tasks start no task groups
        else:
            await self._buffer.put(None)

    async def _begin_part(self, part: SubRequest, lease: EngineLease) -> None:
        async with AsyncExitStack() as stack:
            _, stream = await self.begin(stack, part.request)
            self._streams.append((part, stream))
            await self._read_part(part, stream, lease)

    async def _read_part(self, part: SubRequest, stream: EngineStream, lease: EngineLease) -> None:
        async for piece in self._release_places(stream, lease):
            await self._buffer.put((part, piece))

    async def _release_places(self, stream: EngineStream, lease: EngineLease) -> AsyncIterator[Piece]:
        """Yield a part's pieces and release the place of each finished sequence."""
        ended: set[int] = set()
        async for piece in stream:
            for choice in piece[1]["choices"]:
                if choice.get("finish_reason") and choice["index"] not in ended:
                    ended.add(choice["index"])
                    lease.release(1)
            yield piece
        lease.release()
