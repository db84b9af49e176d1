"""Measure how adapt jobs slow down running answers: streams with and without a running job, in turn, in one run.

A block is a closed loop of clients that stream answers for warm users. Blocks alternate: A without jobs, and B with
training jobs, one after the other; the next A waits until the worker has ended the step that it was in. The p50 and p99
of first tokens and of gaps between tokens are over all blocks; the cost of jobs is the ratio of the medians of the two
blocks of a pair.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import aiohttp
import typer
from rich.progress import Progress

from bench import script
from bench.page.report import Spread, percentile, report
from bench.rig.client import authorization, has_text, stream_chunks

USERS = ("bench-beside-a", "bench-beside-b")
TRAINED = "bench-beside-trained"
ITEMS = {
    USERS[0]: ["The swell came in at dawn.", "We waxed the boards."],
    USERS[1]: ["The roses want pruning.", "I moved the beds."],
}
WORDS = "the tide turned and the boats went home before the rain could reach the harbour wall again that evening "
SAMPLES = [{"input": f"Tell me about day {n}. {WORDS * 2}", "output": f"Day {n}: {WORDS}"} for n in range(10)]
PATIENCE_S = 120.0
SETTLE_S = 15.0  # a worker hears of a cancelled job within a second, and ends its step of training
MANY = 500  # values of which a 99th percentile says something
POLL_S = 0.2


@dataclass(slots=True)
class Block:
    """Readings of one block in ms."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def main(
    *,
    gateway: Annotated[str, typer.Option(help="URL of the gateway of a running `mta up`.")] = "http://127.0.0.1:8000",
    pairs: Annotated[int, typer.Option(help="Pairs of blocks, after one pair for warm-up.", min=5)] = 5,
    requests: Annotated[int, typer.Option(help="Answers in a block.", min=2)] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 32,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure first-token and inter-token latency, p50 and p99, with and without a running job."""
    blocks, cancels_ms = asyncio.run(_measure(gateway, pairs, requests, max_tokens))
    rows: list[tuple[str, object]] = []
    for what in ("first", "gaps"):
        name = {"first": "first token", "gaps": "inter-token"}[what]
        with_job, without = ([getattr(block, what) for block in blocks[side][1:]] for side in ("with", "without"))
        ratios = [median(a) / median(b) for a, b in zip(with_job, without, strict=True)]
        rows.append((f"{name}: with a job over without", Spread.of(ratios)))
        for side, readings in (("without", without), ("with", with_job)):
            pooled = list(itertools.chain(*readings))
            late, at = ("p99", 0.99) if len(pooled) >= MANY else ("slowest", 1.0)
            found = f"{percentile(pooled, 0.5):.0f}, {percentile(pooled, at):.0f}"
            rows.append((f"{name}: p50 and {late} {side} a job, ms", found))
    if cancels_ms:
        rows.append(("cancelling a running job: until it says cancelled, ms", Spread.of(cancels_ms)))
    title = f"Answers beside a running adapt job: {pairs} pairs of {requests} streams, {len(USERS)} at a time"
    report(f"{title}, {max_tokens} tokens each", rows, out)


async def _measure(
    gateway: str, pairs: int, requests: int, max_tokens: int
) -> tuple[dict[str, list[Block]], list[float]]:
    blocks: dict[str, list[Block]] = {"without": [], "with": []}
    cancels_ms: list[float] = []
    numbers = itertools.count()
    connector = aiohttp.TCPConnector(keepalive_timeout=4)
    async with aiohttp.ClientSession(gateway, headers=authorization(), connector=connector) as session:
        try:
            for user, texts in ITEMS.items():
                await _ask(session, "PUT", f"/users/{user}/profile", {"items": [{"text": text} for text in texts]})
            with Progress() as progress:
                task = progress.add_task("A B A B", total=2 * (pairs + 1))
                for _, side in itertools.product(range(pairs + 1), blocks):
                    async with training(session, cancels_ms) if side == "with" else nullcontext():
                        blocks[side].append(await _block(session, numbers, requests, max_tokens))
                    if side == "with":
                        await asyncio.sleep(SETTLE_S)
                    progress.advance(task)
        finally:
            for user in (*USERS, TRAINED):
                async with session.delete(f"/users/{user}"):
                    pass  # a user can be unknown if the run ended early
    return blocks, cancels_ms


@asynccontextmanager
async def training(session: aiohttp.ClientSession, cancels_ms: list[float]) -> AsyncIterator[None]:
    """Keep jobs in training, one after the other, until the block ends; cancel the last one and time that.

    Raises:
        ExceptionGroup: if a job fails or cannot be posted, which ends the block at once, or if none begins in time.
    """
    begun, over, job = asyncio.Event(), asyncio.Event(), dict[str, Any]()

    async def train() -> None:
        while not over.is_set():
            # Without a new idempotency key, the same samples would return the job that has just succeeded.
            body = {"samples": SAMPLES, "idempotency_key": secrets.token_hex(16)}
            job.update(await _ask(session, "POST", f"/users/{TRAINED}/adapt", body))
            while not (job["ended_at"] or over.is_set()):
                await asyncio.sleep(POLL_S)
                job.update(await _ask(session, "GET", f"/jobs/{job['id']}"))
                if job["progress"]["step"]:
                    begun.set()
            if job["state"] == "failed":
                raise RuntimeError(f"job {job['id']} failed: {job['error']}")

    async with asyncio.TaskGroup() as group:
        group.create_task(train())
        await asyncio.wait_for(begun.wait(), PATIENCE_S)
        yield
        over.set()  # not a task cancellation: the id of a job that is just being posted is needed to cancel it
    start_s = time.perf_counter()
    async with session.delete(f"/jobs/{job['id']}") as response:
        if response.status == 200:  # it had not ended on its own
            cancels_ms.append((time.perf_counter() - start_s) * 1000)


async def _block(
    session: aiohttp.ClientSession, numbers: itertools.count[int], requests: int, max_tokens: int
) -> Block:
    """Run a closed loop of one client per user until all requests are answered."""
    block, left = Block(), iter(range(requests))

    async def client(user: str) -> None:
        for _ in left:
            prompt = f"{next(numbers)} is a number. Write a few sentences about it."
            await _stream(session, {"user_id": user, "prompt": prompt, "max_tokens": max_tokens}, block)

    await asyncio.gather(*map(client, USERS))
    return block


async def _stream(session: aiohttp.ClientSession, body: dict[str, Any], block: Block) -> None:
    """Stream one answer and time each chunk of text."""
    last_s, first = time.perf_counter(), True
    async with session.post("/generate", json=body | {"stream": True, "temperature": 0}) as response:
        response.raise_for_status()
        async for chunk in stream_chunks(response):
            if has_text(chunk):
                now_s = time.perf_counter()
                (block.first if first else block.gaps).append((now_s - last_s) * 1000)
                last_s, first = now_s, False


async def _ask(session: aiohttp.ClientSession, method: str, path: str, body: object = None) -> dict[str, Any]:
    async with session.request(method, path, json=body) as response:
        answer: dict[str, Any] = await response.json()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {answer}")
        return answer


if __name__ == "__main__":
    script(main)
