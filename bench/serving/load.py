"""Load on an engine: streams one by one, all at once, in a closed loop, or arriving by chance.

Each stream is asked for and timed by vLLM's own load generator. Every prompt is made of random tokens and salted, so
that nothing of it is in a cache. An answer has exactly as many tokens as asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bench.rig.engine import KEY, Engine
from server.engine_protocol import key_header


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the adapter's name, the prompt as token ids, and the tokens of the answer."""

    model: str
    prompt: Sequence[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """How a stream went: ms to its first token, ms between the next ones, and how many tokens there were."""

    first_ms: float
    gaps_ms: Sequence[float]
    tokens: int


class Prompts:
    """Random prompts for a model, never the same twice."""

    def __init__(self, model: Path, seed: int = 0) -> None:
        vocabulary = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
        self._ids = range(vocabulary // 4, vocabulary * 3 // 4)  # no special token, no end
        self._random = random.Random(seed)

    def __call__(self, tokens: int) -> list[int]:
        """A prompt of so many tokens."""
        return self._random.choices(self._ids, k=tokens)


class Loader:
    """Asks one engine; made by `loading`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = f"{url}/v1/completions"
        self._session = session
        self._salts = (f"{os.getpid()}-{number}" for number in itertools.count())

    async def stream(self, ask: Ask) -> Answer:
        """One streamed answer.

        Raises:
            RuntimeError: when it fails: a figure that leaves failures out is none.
        """
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

        wanted = RequestFuncInput(
            prompt=list(ask.prompt),
            api_url=self._url,
            prompt_len=len(ask.prompt),
            output_len=ask.tokens,
            model=ask.model,
            extra_headers=key_header(KEY),
            extra_body={"temperature": 0, "cache_salt": next(self._salts)},
            ignore_eos=True,
        )
        found = await async_request_openai_completions(wanted, self._session)
        if not found.success:
            raise RuntimeError(f"{ask.model} was not answered: {found.error}")
        return Answer(found.ttft * 1000, [gap * 1000 for gap in found.itl], found.output_tokens)

    async def together(self, asks: Iterable[Ask]) -> list[Answer]:
        """All at the same time."""
        return await asyncio.gather(*map(self.stream, asks))

    async def closed_loop(self, asks: Iterator[Ask], clients: int) -> tuple[list[Answer], float]:
        """`clients` clients, each asking for the next one as soon as it is answered; answers, and seconds in all."""
        answers: list[Answer] = []

        async def client() -> None:
            for ask in asks:
                answers.append(await self.stream(ask))

        start_s = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return answers, time.perf_counter() - start_s

    async def arriving(self, asks: Iterable[Ask], per_s: float, burst: int = 1, seed: int = 0) -> list[Answer]:
        """Open loop: arrivals of a Poisson process, so many at the same moment, however long the answers take."""
        chance, under_way = random.Random(seed), []
        for number, ask in enumerate(asks):
            if number % burst == 0:
                await asyncio.sleep(chance.expovariate(per_s / burst))
            under_way.append(asyncio.create_task(self.stream(ask)))
        return await asyncio.gather(*under_way)


@asynccontextmanager
async def loading(*engines: Engine) -> AsyncIterator[list[Loader]]:
    """A loader for each engine."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # below vLLM's own 5 s
    async with aiohttp.ClientSession(connector=connector) as session:
        yield [Loader(engine.url, session) for engine in engines]
