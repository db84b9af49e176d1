"""Feedbacks a second, and what they do to answers: a gateway, a real engine with a tiny model, two kinds of clients.

    python -m bench.serving.feedback

Answers arrive at half of the capacity, alone and beside clients that give feedback without a pause, in turn. Each
feedback sends another text instead of the answer, so that it becomes an item and a sample.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from bench import script
from bench.fleet.fairness import PLACES, USERS, pinned_gateway
from bench.fleet.streams import Load, loading, user_bodies
from bench.page.report import Spread, marked, report
from bench.rig.tiny import world

OK, TOKENS = 200, 32


def main(
    *,
    seconds: Annotated[float, typer.Option(help="Seconds of each load, over all turns.", min=1)] = 60,
    turns: Annotated[int, typer.Option(help="Turns of each load.", min=1)] = 5,
    clients: Annotated[int, typer.Option(help="Clients that give feedback.", min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure feedback beside answers."""
    with tempfile.TemporaryDirectory() as scratch, pinned_gateway(Path(scratch), {}) as (subject, url):
        rows = asyncio.run(_measure(url, seconds / turns, turns, clients))
    report(f"Feedback from {clients} clients beside answers of {TOKENS} tokens, {subject.title}", rows, out)


async def _measure(url: str, seconds: float, turns: int, clients: int) -> list[tuple[str, object]]:
    gc.collect()
    gc.freeze()  # a collection of all imported objects would stop the clients for half a second
    alone, beside, rates = list[Load](), list[Load](), list[float]()
    statuses: Counter[int] = Counter()
    async with loading([url], user_bodies(TOKENS, USERS)) as loader:
        await loader.closed(PLACES, min(seconds, 5))
        half = (await loader.closed(PLACES, seconds)).rate / 2
        for turn in range(turns):
            alone.append(await loader.open(half, seconds, seed=turn))
            before = statuses[OK]
            async with _giving_feedback(url, clients, statuses):
                beside.append(await loader.open(half, seconds, seed=turn))
            rates.append((statuses[OK] - before) / beside[-1].seconds)
    of: dict[str, Callable[[Load], float]] = {
        "answers a second": lambda load: load.rate,
        "first token, p50": lambda load: load.first_ms(0.5),
        "whole answer, p50": lambda load: load.whole_ms(0.5),
        "whole answer, p99": lambda load: load.whole_ms(0.99),
    }
    return [
        ("answers a second, offered", round(half, 1)),
        ("feedbacks a second", Spread.of(rates)),
        ("feedbacks by status", marked(dict(statuses), statuses.keys() <= {OK})),
        *(
            (f"{name}, beside feedback over alone", Spread.ratio(list(map(read, beside)), list(map(read, alone))))
            for name, read in of.items()
        ),
        ("answers not served", sum(len(load.streams) - len(load.served) for load in (*alone, *beside))),
    ]


@asynccontextmanager
async def _giving_feedback(url: str, clients: int, statuses: Counter[int]) -> AsyncIterator[None]:
    """Let clients give feedback in a closed loop, each on the answers to a person of its own."""
    async with aiohttp.ClientSession(url) as session, asyncio.TaskGroup() as group:
        tasks = [group.create_task(_client(session, f"person-{number}", statuses)) for number in range(clients)]
        yield
        for task in tasks:
            task.cancel()


async def _client(session: aiohttp.ClientSession, user_id: str, statuses: Counter[int]) -> None:
    async with session.post("/generate", json={"user_id": user_id, "prompt": "Hello", "max_tokens": 4}) as response:
        answer = await response.json()
    text = answer["text"]
    for number in itertools.count():
        said: dict[str, Any] = {"answer": answer["id"], "input": "Hello", "text": text}
        final = f"{world(number % 6)}, as person number {number} says it"
        async with session.post(f"/users/{user_id}/feedback", json=said | {"final": final}) as response:
            statuses[response.status] += 1


if __name__ == "__main__":
    script(main)
