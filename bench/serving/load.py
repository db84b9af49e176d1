"""Load on an engine: single streams, all at once, in a closed loop, or with random arrivals.

vLLM's own load generator requests and times each stream. Every prompt consists of random tokens and has a salt, so that
it is never cached. An answer has exactly the requested number of tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.rig.engine import KEY, Engine
from bench.rig.processes import sleep_until
from server.engine_protocol import key_header


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the adapter's name, the prompt as token ids, and the tokens of the answer."""

    model: str
    prompt: Sequence[int]
    tokens: int
    body: Mapping[str, Any] = field(default_factory=dict)  # further fields


@dataclass(frozen=True, slots=True)
class Answer:
    """Timing of a stream: ms to the first token, ms between tokens, and the number of tokens."""

    first_ms: float
    gaps_ms: Sequence[float]
    tokens: int


class Prompts:
    """Distinct random prompts for a model."""

    def __init__(self, model: Path) -> None:
        vocabulary = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
        self._ids = range(vocabulary // 4, vocabulary * 3 // 4)  # without special tokens
        self._random = random.Random(0)

    def __call__(self, tokens: int) -> list[int]:
        """Return a prompt of `tokens` tokens."""
        return self._random.choices(self._ids, k=tokens)


class Loader:
    """A client of one engine; created by `loading`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = f"{url}/v1/completions"
        self._session = session
        self._salts = (f"{os.getpid()}-{number}" for number in itertools.count())

    async def stream(self, ask: Ask) -> Answer:
        """Request one streamed answer.

        Raises:
            RuntimeError: if the request fails: figures must not omit failures.
        """
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

        wanted = RequestFuncInput(
            prompt=list(ask.prompt),
            api_url=self._url,
            prompt_len=len(ask.prompt),
            output_len=ask.tokens,
            model=ask.model,
            extra_headers=key_header(KEY),
            extra_body={"temperature": 0, "cache_salt": next(self._salts), **ask.body},
            ignore_eos=True,
        )
        output = await async_request_openai_completions(wanted, self._session)
        if not output.success:
            raise RuntimeError(f"{ask.model} was not answered: {output.error}")
        return Answer(output.ttft * 1000, [gap * 1000 for gap in output.itl], output.output_tokens)

    async def token_ids(self, ask: Ask) -> list[int]:
        """Return the token ids of an answer."""
        body = {"model": ask.model, "prompt": ask.prompt, "max_tokens": ask.tokens, "return_token_ids": True}
        body |= {"temperature": 0, "ignore_eos": True}
        async with self._session.post(self._url, json=body, headers=key_header(KEY), raise_for_status=True) as response:
            ids: list[int] = (await response.json())["choices"][0]["token_ids"]
        return ids

    async def together(self, asks: Iterable[Ask]) -> list[Answer]:
        """Send all requests at the same time."""
        return await asyncio.gather(*map(self.stream, asks))

    async def closed_loop(self, asks: Iterator[Ask], clients: int) -> tuple[list[Answer], float]:
        """Run a closed loop: clients send the next request after an answer; return answers and seconds."""
        answers: list[Answer] = []

        async def client() -> None:
            for ask in asks:
                answers.append(await self.stream(ask))

        start_s = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return answers, time.perf_counter() - start_s

    async def arriving(self, asks: Iterable[Ask], per_s: float) -> list[Answer]:
        """Run an open loop: requests arrive as a Poisson process, whatever the answers take."""
        chance, under_way, next_s = random.Random(0), [], time.perf_counter()
        for ask in asks:
            next_s += chance.expovariate(per_s)
            await sleep_until(next_s)
            under_way.append(asyncio.create_task(self.stream(ask)))
        return await asyncio.gather(*under_way)


@asynccontextmanager
async def loading(*engines: Engine) -> AsyncIterator[list[Loader]]:
    """Yield a loader for each engine."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # below vLLM's own 5 s
    async with aiohttp.ClientSession(connector=connector) as session:
        yield [Loader(engine.url, session) for engine in engines]
