"""Measure how one key affects others: a gateway, an engine, and keys with random arrivals.

    wide     a key's short requests at half of the capacity, alone and beside its own requests for 32 answers at once
    greedy   three keys at a sixth of the capacity each, beside a fourth that does the same, and beside a greedy fourth:
             event streams, slow bodies, requests for 32 answers, unread streams, and deletes of unknown users, each
             repeated as soon as it is refused

The engine is real, its model is tiny. The engine has its own core, so that the result depends on the sharing of the
engine and not on the operating system's scheduling of clients, gateway and model. Exit status 1 if a claim fails.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import typer

from bench import script
from bench.fleet.overload import LONG, LONG_PATH, Rows
from bench.fleet.streams import Load, Loader, gateways_with_users, loading, reading, user_bodies
from bench.page.report import Spread, marked, percentile, report
from bench.rig.servers import vllm_server
from bench.rig.subject import Subject, tiny
from bench.rig.valkey import ValkeyProcess
from mta_client import Client
from server.settings import Settings
from server.store.opening import open_stores
from server.store.tenants.access_keys import Scope, access_key, new_secret

PARTS = ("wide", "greedy")
PLACES = 32
"""Sequences per batch, and answers per wide request."""
USERS = 8
KEYS = ("ada", "bob", "kai", "eve")
"""Names of the keys; the fourth is the greedy one."""
MIN_RATE_RATIO, MAX_P99_RATIO = 0.8, 1.5
WORST = {"events": 64, "trickling": 32, "wide": 8, "unread": 16, "deletes": 2}
"""Actions of the greedy key, and the number of connections for each."""
SMALL_BODY = 64 << 10
UNREAD = {name: value for name, value in LONG.items() if name not in ("logprobs", "top_logprobs")}
"""A request for an answer larger than a socket's buffers; without log-probabilities, to save engine time."""
RETRY_DELAY_S = 0.05
LEAD_IN_S = 4.0
"""Seconds of load from the three keys before a measurement; the fourth starts halfway."""

Key = dict[str, str]


def main(
    *,
    part: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; may be repeated.", show_default="all")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each load, over all turns.", min=1)] = 60,
    turns: Annotated[int, typer.Option(help="Turns of each load.", min=1)] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 32,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure how one key's requests slow down the others and its own."""
    chosen = part or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    secrets = {name: new_secret() for name in KEYS}
    with tempfile.TemporaryDirectory() as scratch, pinned_gateway(Path(scratch), secrets) as (subject, url):
        with Client(url, key=secrets[KEYS[-1]]) as client:
            job = client.adapt("user-0", [{"input": "Any plans?", "output": "To the sea, at dawn."}])
        keys = [{"Authorization": f"Bearer {secret}"} for secret in secrets.values()]
        bench = Fairness(url, keys, job.id, tokens)
        rows = asyncio.run(bench.measure(chosen, seconds, turns))
    title = f"Fairness: a gateway, an engine of {PLACES} places, {subject.title}, answers of {tokens} tokens"
    loads = {what: [asdict(load) for load in loads] for what, loads in bench.loads.items()}
    report(title, rows, out, loads=loads)


@contextmanager
def pinned_gateway(folder: Path, secrets: Mapping[str, str]) -> Iterator[tuple[Subject, str]]:
    """Run a gateway and an engine, which has the last core for itself; yield model and bank, and the gateway's URL.

    Args:
        folder: folder for all data.
        secrets: API keys by name; each has its own tenant with `USERS` users. Without any, clients need none.
    """
    subject = tiny(folder)
    *others, engines_core = sorted(os.sched_getaffinity(0))
    with ValkeyProcess(folder / "valkey") as store:
        asyncio.run(_add_keys(store.url, secrets))
        os.sched_setaffinity(0, {engines_core})
        with vllm_server(subject, max_num_seqs=PLACES, max_loras=USERS) as engine:
            os.sched_setaffinity(0, others or {engines_core})
            keys: list[str | None] = [*secrets.values()]
            own: dict[str, Any] = {
                "keys": keys or [None],
                "engine_places": PLACES,
            }  # users share recipes: there are fewer slots
            with gateways_with_users(subject.bank, store, engine, USERS, **own) as urls:
                yield subject, urls[0]


async def _add_keys(url: str, secrets: Mapping[str, str]) -> None:
    async with open_stores(Settings(redis_url=url)) as stores:
        for name, secret in secrets.items():
            await stores.keys.add(access_key(secret, name, name, frozenset(Scope)))


class Fairness:
    """The measurements.

    Args:
        url: URL of the gateway.
        keys: headers of `KEYS`.
        job: id of the last key's job, which no worker takes.
        tokens: tokens per answer.

    Attributes:
        loads: all loads by name.
    """

    def __init__(self, url: str, keys: Sequence[Key], job: str, tokens: int) -> None:
        self.loads: dict[str, list[Load]] = {}
        self._url = url
        self._keys = keys
        self._job = job
        self._tokens = tokens

    async def measure(self, parts: Sequence[str], seconds: float, turns: int) -> Rows:
        """Measure the capacity and the parts."""
        gc.collect()
        gc.freeze()  # a collection of all imported objects would stop the clients for half a second
        async with AsyncExitStack() as stack:
            loaders = [
                await stack.enter_async_context(loading([self._url], user_bodies(self._tokens, USERS), key))
                for key in self._keys
            ]
            await loaders[0].closed(PLACES, min(seconds, 5))
            capacity = (await loaders[0].closed(PLACES, seconds / turns)).rate
            rows: Rows = [("capacity: answers a second", round(capacity, 1))]
            if "wide" in parts:
                rows += await self._wide(loaders[0], capacity / 2, seconds / turns, turns)
            if "greedy" in parts:
                rows += await self._greedy(loaders, capacity / 6, seconds / turns, turns)
        return rows

    async def _wide(self, loader: Loader, per_s: float, seconds: float, turns: int) -> Rows:
        whats = ["short ones, alone", f"short ones, beside {PLACES} answers at once"]
        wide: list[float] = []
        for turn in range(turns):
            await self._offered(whats[0], [loader], per_s, seconds, turn)
            async with self._repeating("wide", self._ask_for_many(self._keys[0], wide), 1, {}, Counter()):
                await self._offered(whats[1], [loader], per_s, seconds, turn)
        return [
            *itertools.chain(*map(self._rows, whats)),
            ("answers a second, beside over alone", str(self._ratio(whats, lambda load: load.rate))),
            ("p99, beside over alone", str(self._ratio(whats, lambda load: load.whole_ms(0.99)))),
            (f"requests for {PLACES} answers: answered", len(wide)),
            ("they took, p50, s", f"{percentile(wide, 0.5):.2f}" if wide else "-"),
        ]

    async def _greedy(self, loaders: Sequence[Loader], per_s: float, seconds: float, turns: int) -> Rows:
        whats = ["three keys, the fourth as they", "three keys, the fourth at its worst"]
        *three, fourth = loaders
        worst = Counter[str]()
        for turn in range(turns):
            behaving = asyncio.create_task(fourth.open(per_s, seconds, seed=1000 + turn))
            await self._offered(whats[0], three, per_s, seconds, turn)
            await behaving
            before = [asyncio.create_task(loader.open(per_s, LEAD_IN_S)) for loader in three]
            await asyncio.sleep(LEAD_IN_S / 2)
            async with self._worst(worst):
                await asyncio.wait(before)
                await self._offered(whats[1], three, per_s, seconds, turn)
        rate = self._ratio(whats, lambda load: load.rate)
        longer = self._ratio(whats, lambda load: load.whole_ms(0.99))
        return [
            *itertools.chain(*map(self._rows, whats)),
            ("what the fourth did", ", ".join(f"{number} {what}" for what, number in sorted(worst.items()))),
            (
                "the three's answers a second, worst over behaving",
                marked(f"{rate}, at least {MIN_RATE_RATIO}", rate.median >= MIN_RATE_RATIO),
            ),
            (
                "the three's p99, worst over behaving",
                marked(f"{longer}, at most {MAX_P99_RATIO}", longer.median <= MAX_P99_RATIO),
            ),
        ]

    async def _offered(self, what: str, loaders: Sequence[Loader], per_s: float, seconds: float, turn: int) -> None:
        """Run one turn of a load, the same from each loader; compared loads have the same arrivals in the same turn."""
        loads = await asyncio.gather(
            *(loader.open(per_s, seconds, seed=len(loaders) * turn + number) for number, loader in enumerate(loaders))
        )
        streams = [stream for load in loads for stream in load.streams]
        self.loads.setdefault(what, []).append(Load(streams, max(load.seconds for load in loads)))

    def _ratio(self, whats: Sequence[str], of: Callable[[Load], float]) -> Spread:
        before, beside = (list(map(of, self.loads[what])) for what in whats)
        return Spread.ratio(beside, before)

    def _rows(self, what: str) -> Rows:
        loads = self.loads[what]
        streams = sum(len(load.streams) for load in loads)
        return [
            (f"{what}: answers a second", str(Spread.of([load.rate for load in loads]))),
            (f"{what}: refused (429)", f"{sum(load.refused for load in loads)} of {streams}"),
            (f"{what}: failed in any other way", str(sum([sum(load.failures.values()) for load in loads]))),
            (f"{what}: whole, p99, ms", str(Spread.of([load.whole_ms(0.99) for load in loads]))),
        ]

    @asynccontextmanager
    async def _worst(self, counts: Counter[str]) -> AsyncIterator[None]:
        """Run all actions of the greedy key until the block ends."""
        key = self._keys[-1]
        numbers = itertools.count()
        address = urlsplit(self._url)

        async def follow(session: aiohttp.ClientSession) -> int:
            async with session.get(f"{self._url}/jobs/{self._job}/events") as response:
                await response.read()
                return response.status

        async def delete(session: aiohttp.ClientSession) -> int:
            async with session.delete(f"{self._url}/users/nobody-{next(numbers)}") as response:
                return response.status

        async def trickle(session: aiohttp.ClientSession) -> int:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                head = f"PUT /users/user-0/profile HTTP/1.1\r\nHost: {address.netloc}\r\n"
                head += f"Authorization: {key['Authorization']}\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: 200000\r\n\r\n".encode() + b" " * (SMALL_BODY + 1))
                answer = asyncio.create_task(reader.readline())
                while not answer.done():
                    writer.write(b" ")
                    await asyncio.wait([answer], timeout=1)
                return int((answer.result().split() or [b"", b"0"])[1])
            finally:
                writer.transport.abort()

        kinds = {
            "events": follow,
            "trickling": trickle,
            "wide": self._ask_for_many(key, []),
            "deletes": delete,
        }
        async with AsyncExitStack() as stack:
            for what, connections in WORST.items():
                if what in kinds:
                    clients = self._repeating(what, kinds[what], connections, key, counts)
                else:
                    clients = reading([self._url] * connections, LONG_PATH, UNREAD, 0.0, key)
                await stack.enter_async_context(clients)
            yield

    def _ask_for_many(self, key: Key, took: list[float]) -> Callable[[aiohttp.ClientSession], Awaitable[int]]:
        """Return a function that requests PLACES answers, each four times as long as the others' answers."""
        body = {"model": "base", "messages": [{"role": "user", "content": "Tell me everything."}], "n": PLACES}
        body |= {"max_tokens": 4 * self._tokens}
        clock = asyncio.get_running_loop().time

        async def ask(session: aiohttp.ClientSession) -> int:
            start_s = clock()
            async with session.post(f"{self._url}/v1/chat/completions", json=body, headers=key) as response:
                await response.read()
                if response.status == 200:
                    took.append(clock() - start_s)
                return response.status

        return ask

    @asynccontextmanager
    async def _repeating(
        self,
        what: str,
        act: Callable[[aiohttp.ClientSession], Awaitable[int]],
        clients: int,
        key: Key,
        counts: Counter[str],
    ) -> AsyncIterator[None]:
        """Run clients that repeat an action until the block ends, with a short delay after each end or refusal."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=key) as session:

            async def client() -> None:
                while True:
                    status = 0
                    with suppress(aiohttp.ClientError, OSError):
                        counts[what] += 1
                        status = await act(session)
                    counts[f"{what}: {status}"] += 1
                    await asyncio.sleep(RETRY_DELAY_S)

            tasks = [asyncio.create_task(client()) for _ in range(clients)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    script(main)
