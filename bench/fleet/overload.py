"""Measure overload of two gateways: many concurrent streams, twice the capacity, and slow readers.

    streams   500 clients that stream all the time: no stream may be lost
    overload  the engine's capacity, then random arrivals at that rate and at twice that rate: the excess is refused,
              and the other requests take little longer
    readers   random arrivals at half of the capacity: alone, and beside clients of long answers that read a few bytes
              per second or nothing, which must hardly slow down the others

The engine is real; its model is tiny, which maximises the gateways' load. Exit status 1 if a claim fails.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import Progress

from bench import script
from bench.fleet.streams import Load, Loader, OnStream, gateways_with_users, loading, reading, user_bodies
from bench.page.report import Spread, console, marked, report
from bench.rig.client import summed
from bench.rig.servers import vllm_server
from bench.rig.subject import Subject, tiny
from bench.rig.valkey import ValkeyProcess

PARTS = ("streams", "overload", "readers")
GATEWAYS = 2
USERS = 16
PLACES = 16
"""Sequences per batch in measurements of overload."""
MAX_P99_RATIO = 1.5
TURNS = 5
"""Number of alternations between two compared loads, so that other load on the machine affects both."""
SEND_TIMEOUT_S = 5
SLOW_BYTES_PER_S = 500.0
LONG_PATH = "/v1/chat/completions"
LONG = {
    "model": "base",
    "messages": [{"role": "user", "content": "Tell me everything."}],
    "max_tokens": 1900,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 20,
}
"""A request for an answer of some megabytes, more than a socket's buffers hold."""

Rows = list[tuple[str, object]]
"""Rows of the report."""


def main(
    *,
    part: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; may be repeated.", show_default="all")
    ] = None,
    streams: Annotated[int, typer.Option(help="Concurrent streaming clients.", min=1)] = 500,
    seconds: Annotated[float, typer.Option(help="Seconds of concurrent streaming.", min=1)] = 180,
    phase: Annotated[float, typer.Option(help="Seconds of each other measurement.", min=1)] = 60,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure two gateways with more requests than their engine can serve."""
    chosen = part or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"there is no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    rows: Rows = []
    columns = ("{task.description}", "{task.completed:.0f}")
    with tempfile.TemporaryDirectory() as scratch, Progress(*columns, console=console()) as progress:

        def bar(what: str) -> OnStream:
            task = progress.add_task(what, total=None)
            return lambda _: progress.advance(task)

        subject = tiny(Path(scratch))
        records: dict[str, Load] = {}
        if "streams" in chosen:
            with _fleet(subject, Path(scratch) / "streams", streams) as urls:
                rows += asyncio.run(Overload(urls, tokens, bar, records).streams(streams, seconds))
        if set(chosen) - {"streams"}:
            with _fleet(subject, Path(scratch) / "overload", PLACES) as urls:
                rows += asyncio.run(Overload(urls, tokens, bar, records).beyond(chosen, phase))
    title = f"Overload: {GATEWAYS} gateways, one engine, {subject.title}, answers of {tokens} tokens"
    report(title, rows, out, **{what: _summary(load) for what, load in records.items()})


@contextmanager
def _fleet(subject: Subject, folder: Path, sequences: int) -> Iterator[list[str]]:
    """Run gateways with an engine for `sequences` and a store with the users; yield the gateways' URLs."""
    folder.mkdir()
    places = -(-sequences // GATEWAYS)  # users share recipes: there are fewer slots
    with (
        ValkeyProcess(folder / "valkey") as store,
        vllm_server(subject, max_num_seqs=sequences, max_loras=USERS) as engine,
        gateways_with_users(
            subject.bank, store, engine, USERS, gateways=GATEWAYS, send_timeout_s=SEND_TIMEOUT_S, engine_places=places
        ) as urls,
    ):
        yield urls


def _summary(load: Load) -> dict[str, Any]:
    """Summarise a load for the JSON file."""
    return {
        "seconds": load.seconds,
        "refused": load.refused,
        "failures": load.failures,
        "served": [asdict(stream) for stream in load.served[:5000]],
    }


class Overload:
    """The measurements.

    Args:
        urls: URLs of the gateways.
        tokens: tokens per answer.
        begin: called with the name of each measurement; returns a callback for each finished stream.
        records: receives all loads by name.
    """

    def __init__(
        self, urls: Sequence[str], tokens: int, begin: Callable[[str], OnStream], records: dict[str, Load]
    ) -> None:
        self._urls = urls
        self._tokens = tokens
        self._begin = begin
        self._records = records

    async def streams(self, clients: int, seconds: float) -> Rows:
        """Measure `clients` clients that stream all the time."""
        what = f"{clients} streams at once"
        async with loading(self._urls, user_bodies(self._tokens, USERS)) as loader:
            load = self._records[what] = await loader.closed(clients, seconds, self._begin(what))
        lost = len(load.streams) - len(load.served)
        chunks = sum(stream.chunks for stream in load.served)
        return [
            (f"{what}: begun", len(load.streams)),
            (f"{what}: lost", marked(f"{lost} {load.failures or ''}".strip(), lost == 0)),
            (f"{what}: chunks a second", round(chunks / load.seconds)),
            (f"{what}: first chunk, p50 and p99, ms", _two(load.first_ms)),
            (f"{what}: whole, p50 and p99, ms", _two(load.whole_ms)),
        ]

    async def beyond(self, parts: Sequence[str], seconds: float) -> Rows:
        """Measure the capacity, and the parts `overload` and `readers`."""
        async with loading(self._urls, user_bodies(self._tokens, USERS)) as loader:
            await loader.closed(PLACES, min(seconds, 5), self._begin("warm-up"))
            capacity = (await loader.closed(PLACES, seconds / 2, self._begin("capacity"))).rate
            rows: Rows = [("capacity: answers a second", round(capacity, 1))]
            if "overload" in parts:
                rows += await self._twice(loader, capacity, seconds)
            if "readers" in parts:
                rows += await self._readers(loader, capacity, seconds)
        return rows

    async def _twice(self, loader: Loader, capacity: float, seconds: float) -> Rows:
        whats = [f"{times} x capacity offered" for times in (1, 2)]
        once, twice = [], []
        for turn in range(TURNS):
            once.append(await self._offered(loader, capacity, seconds / TURNS, whats[0], turn))
            twice.append(await self._offered(loader, 2 * capacity, seconds / TURNS, whats[1], turn))
        rise = [load.refused / len(load.streams) for load in (self._records[what] for what in whats)]
        return [
            *itertools.chain(*map(self._rows, whats)),
            ("429s rise with what is offered", marked(f"{rise[0]:.0%} to {rise[1]:.0%}", rise[0] < rise[1])),
            ("admitted: p99 at twice over p99 at capacity", _at_most_longer(twice, once)),
        ]

    async def _readers(self, loader: Loader, capacity: float, seconds: float) -> Rows:
        whats = [
            f"half of capacity offered, {how}" for how in ("alone", f"beside {2 * len(self._urls)} that do not read")
        ]
        alone, beside = [], []
        for turn in range(TURNS):
            alone.append(await self._offered(loader, capacity / 2, seconds / TURNS, whats[0], turn))
            slow, idle = (reading(self._urls, LONG_PATH, LONG, per_s) for per_s in (SLOW_BYTES_PER_S, 0.0))
            async with slow, idle:
                await asyncio.sleep(min(seconds / 4, SEND_TIMEOUT_S))  # until the unread data fills all buffers
                beside.append(await self._offered(loader, capacity / 2, seconds / TURNS, whats[1], turn))
            await asyncio.sleep(1)
        left = await self._taken()
        return [
            *itertools.chain(*map(self._rows, whats)),
            ("p99 beside clients that do not read over p99 alone", _at_most_longer(beside, alone)),
            ("places still taken at the end", marked(f"{left:g}", left == 0)),
        ]

    async def _offered(self, loader: Loader, per_s: float, seconds: float, what: str, turn: int) -> float:
        """Run one turn of a load, add it to the records, and return its p99 in milliseconds.

        Compared loads have the same arrivals in the same turn.
        """
        load = await loader.open(per_s, seconds, self._begin(what), seed=turn)
        before = self._records.get(what, Load((), 0.0))
        self._records[what] = Load([*before.streams, *load.streams], before.seconds + load.seconds)
        return load.whole_ms(0.99)

    def _rows(self, what: str) -> Rows:
        load = self._records[what]
        return [
            (f"{what}: served a second", round(load.rate, 1)),
            (f"{what}: refused (429)", f"{load.refused} of {len(load.streams)}"),
            (f"{what}: failed in any other way", marked(load.failures or 0, not load.failures)),
            (f"{what}: first chunk, p50 and p99, ms", _two(load.first_ms)),
            (f"{what}: whole, p50 and p99, ms", _two(load.whole_ms)),
        ]

    async def _taken(self) -> float:
        """Return the number of engine places in use at all gateways."""
        async with httpx.AsyncClient() as client:
            answers = [await client.get(f"{url}/metrics") for url in self._urls]
        return sum(summed(answer.text, "mta_queue_running") for answer in answers)


def _at_most_longer(over: Sequence[float], under: Sequence[float]) -> str:
    """Judge the median over turns of the ratio of two loads' p99, so that one disturbed turn does not matter."""
    ratio = Spread.ratio(over, under)
    return marked(f"{ratio}, at most {MAX_P99_RATIO}", ratio.median <= MAX_P99_RATIO)


def _two(of: Callable[[float], float]) -> str:
    return f"{of(0.5):,.0f}, {of(0.99):,.0f}"


if __name__ == "__main__":
    script(main)
