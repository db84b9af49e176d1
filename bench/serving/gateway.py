"""Measure the latency that the gateway adds: the same requests through it and to the engine, in turn, in one run.

Both sides request the same recipe with the same prompts, greedily. A pair is one block of requests through the gateway
(A) and one directly to the engine (B): A B A B. Complete answers are timed to their last byte, streams to their first
token. The latency added at p50 is the median over pairs of A's p50 minus B's; at p99, it is the p99 of all A's requests
minus that of all B's. The report also shows the gateway's own account: its total minus the engine's part.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.progress import Progress
from tokenizers import Tokenizer

from bench import script
from bench.page.report import Spread, percentile, report
from bench.rig.client import authorization, has_text, stream_chunks
from bench.rig.engine import Engine
from bench.rig.people import WORDS
from bench.rig.subject import Subject
from bench.rig.up import running_gateway
from bench.rig.valkey import ValkeyProcess
from mta_client import Client

LEVELS = (1, 16)  # concurrent requests
USER = "bench-gateway"
ITEMS = ("The swell came in at dawn.", "We waxed the boards.", "Salt in the coffee again.")
PROMPTS = [f"Write a sentence about the number {number}." for number in range(16)]


@dataclass(slots=True)
class Side:
    """One side of the comparison: its requests and readings."""

    url: str  # the complete URL
    headers: dict[str, str]  # in addition to aiohttp's
    body: dict[str, Any]  # everything but the conversation
    as_messages: bool  # whether the prompt is sent as a conversation
    blocks: list[list[float]] = field(default_factory=list)  # latencies in ms, one list per block
    own_ms: list[float] = field(default_factory=list)  # the gateway's own time, from its answers

    def request(self, prompt: str, stream: bool) -> dict[str, Any]:
        """Return the body of a request."""
        conversation = {"messages": [{"role": "user", "content": prompt}]} if self.as_messages else {"prompt": prompt}
        return self.body | conversation | {"stream": stream}

    async def ask(self, session: aiohttp.ClientSession, prompt: str, stream: bool) -> float:
        """Send one request; return the ms to the last byte, or to the first token of a stream."""
        start_s = time.perf_counter()
        async with session.post(self.url, json=self.request(prompt, stream), headers=self.headers) as response:
            response.raise_for_status()
            if not stream:
                answer = json.loads(await response.read())
                elapsed_s = time.perf_counter() - start_s
                timings = answer.get("personalization", {}).get("timings_ms")
            else:
                elapsed_s, timings = await _first_token(response, start_s)
        if timings:
            self.own_ms.append(timings["total"] - timings["engine"])
        return elapsed_s * 1000

    async def block(self, session: aiohttp.ClientSession, *, requests: int, concurrent: int, stream: bool) -> None:
        """Run a closed loop of `concurrent` clients until `requests` are answered."""
        prompts = iter(list(itertools.islice(itertools.cycle(PROMPTS), requests)))
        taken: list[float] = []

        async def client() -> None:
            for prompt in prompts:
                taken.append(await self.ask(session, prompt, stream))

        await asyncio.gather(*(client() for _ in range(concurrent)))
        self.blocks.append(taken)


def main(
    *,
    gateway: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8000",
    engine: Annotated[str, typer.Option(help="URL of the engine behind it.")] = "http://127.0.0.1:8001",
    key: Annotated[str, typer.Option(help="The engine's key.", envvar="MTA_ENGINE_KEY")] = "",
    pairs: Annotated[int, typer.Option(help="Pairs of blocks, after one pair for warm-up.", min=5)] = 5,
    requests: Annotated[int, typer.Option(help="Requests in a block.", min=1)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the latency that the gateway adds at p50 and p99, for complete answers and first tokens of streams."""
    sides = _sides(gateway, engine, key, max_tokens)
    rows, readings = asyncio.run(_measure(sides, pairs, requests))
    title = f"Added by the gateway, ms: {pairs} pairs of {requests} requests, {max_tokens} tokens each"
    report(title, rows, out, readings=readings)


def _sides(gateway: str, engine: str, key: str, max_tokens: int) -> dict[str, Side]:
    """Return both sides, A the gateway and B the engine, for the same recipe."""
    with Client(gateway) as client:
        changed = client.put_profile(USER, ITEMS)
    sampling = {"max_tokens": max_tokens, "temperature": 0}
    direct = sampling | {"model": changed.recipe}
    asked = sampling | {"user_id": USER, "personalize": "merged", "history": 0}
    return {
        "gateway": Side(f"{gateway}/generate", authorization(), asked, False),
        "engine": Side(f"{engine}/v1/chat/completions", {"Authorization": f"Bearer {key}"}, direct, True),
    }


async def _measure(
    sides: dict[str, Side], pairs: int, requests: int
) -> tuple[list[tuple[str, object]], dict[str, Any]]:
    """Measure every mode at every concurrency; return rows for the table, and all readings."""
    rows: list[tuple[str, object]] = []
    readings: dict[str, Any] = {}
    with Progress() as progress:
        task = progress.add_task("A B A B", total=2 * len(LEVELS) * (pairs + 1) * 2)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4)) as session:
            for (what, stream), concurrent in itertools.product((("whole", False), ("first token", True)), LEVELS):
                for side in sides.values():
                    side.blocks, side.own_ms = [], []
                for _, side in itertools.product(range(pairs + 1), sides.values()):
                    await side.block(session, requests=requests, concurrent=concurrent, stream=stream)
                    progress.advance(task)
                label = f"{what}, {concurrent} concurrent"
                rows += _rows(label, sides["gateway"], sides["engine"])
                readings[label] = {name: side.blocks for name, side in sides.items()}
    return rows, readings


def _rows(label: str, a: Side, b: Side) -> list[tuple[str, object]]:
    """Return the rows of one mode at one concurrency, without the first pair, which is for warm-up."""
    a_blocks, b_blocks = a.blocks[1:], b.blocks[1:]
    added = [percentile(x, 0.5) - percentile(y, 0.5) for x, y in zip(a_blocks, b_blocks, strict=True)]
    a_all, b_all = list(itertools.chain(*a_blocks)), list(itertools.chain(*b_blocks))
    own = a.own_ms[len(a.blocks[0]) :]
    return [
        (f"{label}: added at p50", Spread.of(added)),
        (f"{label}: added at p99", f"{percentile(a_all, 0.99) - percentile(b_all, 0.99):.2f}"),
        (f"{label}: p50 and p99 through the gateway", _two(a_all)),
        (f"{label}: p50 and p99 straight to the engine", _two(b_all)),
        (f"{label}: the gateway's own account, p50 and p99", _two(own)),
    ]


def _two(readings: Sequence[float]) -> str:
    return f"{percentile(readings, 0.5):.2f}, {percentile(readings, 0.99):.2f}"


async def _first_token(response: aiohttp.ClientResponse, start_s: float) -> tuple[float, dict[str, float] | None]:
    """Read a stream; return the seconds until its first text, and the timings in its last chunk."""
    first_s, timings = None, None
    async for chunk in stream_chunks(response):
        timings = chunk.get("timings_ms", timings)
        if first_s is None and has_text(chunk):
            first_s = time.perf_counter() - start_s
    if first_s is None:
        raise RuntimeError("a stream without text cannot be timed")
    return first_s, timings


def through_gateway(
    subject: Subject, engine: Engine, folder: Path, tokens: int, pairs: int
) -> tuple[list[float], list[float]]:
    """Measure pairs of first tokens through a gateway with a running engine, in ms: without and with a person."""
    with (
        ValkeyProcess(folder) as store,
        running_gateway(subject.bank, store.url, engine.url) as gateway,
    ):
        with Client(gateway.url) as client:
            client.put_profile(USER, ITEMS)
        sampling = {"max_tokens": 1, "temperature": 0, "user_id": USER}  # the answer is only the first token
        url, levels = f"{gateway.url}/generate", ("none", "merged")
        nobody, person = (Side(url, {}, sampling | {"personalize": level}, False) for level in levels)
        return asyncio.run(_in_turn(nobody, person, _texts(subject.model, tokens), pairs))


def _texts(model: Path, tokens: int) -> Callable[[], str]:
    """Return a function that makes distinct texts of about `tokens` tokens."""
    tokenizer, chance = Tokenizer.from_file(str(model / "tokenizer.json")), random.Random(0)

    def text() -> str:
        ids = tokenizer.encode(" ".join(chance.choices(WORDS, k=tokens)), add_special_tokens=False).ids
        cut: str = tokenizer.decode(ids[:tokens])
        return cut.strip()

    return text


async def _in_turn(a: Side, b: Side, text: Callable[[], str], pairs: int) -> tuple[list[float], list[float]]:
    taken: tuple[list[float], list[float]] = ([], [])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(keepalive_timeout=4)) as session:
        for turn in range(pairs + 1):
            for kept, side in zip(taken, (a, b), strict=True):
                first_ms = await side.ask(session, text(), False)
                if turn:
                    kept.append(first_ms)
    return taken


if __name__ == "__main__":
    script(main)
