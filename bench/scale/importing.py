"""Import thousands of people while others are served: `mta users import` with a real gateway and Valkey.

Each turn has two blocks: four streams through the gateway, first alone, then during the import of some of the people.
The engine has a tiny model, so that the streams mainly wait for the gateway and the store.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from rich.progress import Progress

from bench.page.report import Figures, Spread, percentile
from bench.rig.client import has_text, stream_chunks
from bench.rig.people import WORDS, write_people
from bench.rig.processes import memory_mib, mta
from bench.rig.servers import vllm_server
from bench.rig.subject import tiny
from bench.rig.up import running_gateway
from bench.rig.valkey import ValkeyProcess
from mta_client import Client

TURNS, STREAMS = 5, 4
ALONE_S = 8.0
"""Seconds of the block without an import; the warm-up before the first turn takes as long."""
ITEMS, ITEM_WORDS = 3, 12
TOKENS = 256
"""Tokens of a stream's answer, after which it asks again."""


def measure(people: int, folder: Path, progress: Progress) -> Figures:
    """Import the people, measure, and return a table with one row per figure."""
    subject = tiny(folder)
    with (
        ValkeyProcess(folder / "valkey") as store,
        vllm_server(subject, max_num_seqs=STREAMS, dtype="float32") as engine,
        running_gateway(subject.bank, store.url, engine.url) as gateway,
    ):
        with Client(gateway.url) as client:
            for stream in range(STREAMS):
                client.put_profile(_streamer(stream), [_item(random.Random(stream)) for _ in range(ITEMS)])
        return asyncio.run(_turns(gateway.url, gateway.pid, people, folder, progress))


async def _turns(url: str, pid: int, people: int, folder: Path, progress: Progress) -> Figures:
    part, bar = people // TURNS, progress.add_task("people imported", total=people)
    alone: list[float] = []
    beside: list[float] = []
    rates: list[float] = []
    async with aiohttp.ClientSession() as session:
        async with _streaming(session, url):
            await asyncio.sleep(ALONE_S)
        before = memory_mib(pid)
        for turn in range(TURNS):
            async with _streaming(session, url) as gaps:
                await asyncio.sleep(ALONE_S)
            alone.append(percentile(gaps, 0.99))
            path = write_people(folder / f"people-{turn}.json", _people(turn * part, part))
            async with _streaming(session, url) as gaps:
                start_s = time.perf_counter()
                await _import(path, url)
                rates.append(part / (time.perf_counter() - start_s))
            beside.append(percentile(gaps, 0.99))
            progress.advance(bar, part)
    lines: list[list[object]] = [
        ["people imported a second", Spread.of(rates)],
        ["streams alone: p99 between tokens, ms", Spread.of(alone)],
        ["streams beside the import: p99 between tokens, ms", Spread.of(beside)],
        ["beside over alone", Spread.ratio(beside, alone)],
        ["the gateway's memory before, MiB", before],
        ["the same afterwards, MiB", memory_mib(pid)],
    ]
    title = f"{people:,} people of {ITEMS} items imported through a gateway beside {STREAMS} streams"
    return Figures(title, ("import", "figure"), lines)


@asynccontextmanager
async def _streaming(session: aiohttp.ClientSession, url: str) -> AsyncIterator[list[float]]:
    """Keep streams running until the block ends, and collect the gaps between tokens in ms."""
    gaps: list[float] = []
    over = asyncio.Event()

    async def stream(number: int) -> None:
        asked = {"user_id": _streamer(number), "prompt": "Tell me more.", "max_tokens": TOKENS, "stream": True}
        while not over.is_set():
            async with session.post(f"{url}/generate", json=asked) as response:
                response.raise_for_status()
                last_s = 0.0
                async for chunk in stream_chunks(response):
                    if over.is_set():
                        return
                    if not has_text(chunk):
                        continue
                    now_s = time.perf_counter()
                    gaps.extend([1000 * (now_s - last_s)] if last_s else [])
                    last_s = now_s

    running = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    try:
        yield gaps
    finally:
        over.set()
        await asyncio.gather(*running)


async def _import(path: Path, url: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *mta("users", "import", str(path), "--url", url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the import failed: {output.decode(errors='replace')}")


def _people(first: int, count: int) -> list[object]:
    chance, numbers = random.Random(first), range(first, first + count)
    return [{"user_id": f"person-{n:07d}", "profile": [_item(chance) for _ in range(ITEMS)]} for n in numbers]


def _item(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=ITEM_WORDS))


def _streamer(number: int) -> str:
    return f"streamer-{number}"
