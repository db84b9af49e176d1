"""Streams through several gateways: a closed loop, random arrivals, and clients that read slowly or never."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from bench.page.report import percentile
from bench.rig.engine import Engine
from bench.rig.processes import sleep_until, wait_until
from bench.rig.tiny import world
from bench.rig.up import running_gateway
from bench.rig.valkey import ValkeyProcess
from mta_client import Client

DONE = b"data: [DONE]\n\n"
RECONNECT_AFTER_S = 10.0
"""Seconds after which a client that reads nothing disconnects and asks again."""
NO_KEY: Mapping[str, str] = {}
BROKEN = 0
"""Status of an incomplete stream or a failed connection."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The result of a stream.

    Attributes:
        status: HTTP status; `BROKEN` if the stream was cut short.
        error: code of an error answer.
        first_s, whole_s: seconds until the first and the last byte.
        chunks: number of chunks, including the first and the last.
    """

    status: int
    error: str
    first_s: float
    whole_s: float
    chunks: int


OnStream = Callable[[Stream], object]


@dataclass(frozen=True, slots=True)
class Load:
    """The results of all streams of a load, and the seconds until the last one's end."""

    streams: Sequence[Stream]
    seconds: float

    @property
    def served(self) -> list[Stream]:
        """The complete streams."""
        return [stream for stream in self.streams if stream.status == 200]

    @property
    def rate(self) -> float:
        """Complete streams per second."""
        return len(self.served) / self.seconds

    @property
    def refused(self) -> int:
        """Number of streams refused with 429."""
        return sum(stream.status == 429 for stream in self.streams)

    @property
    def failures(self) -> dict[str, int]:
        """Counts of other statuses than 200 and 429, with their error codes."""
        return Counter(f"{stream.status} {stream.error}" for stream in self.streams if stream.status not in (200, 429))

    def whole_ms(self, fraction: float) -> float:
        """Return the percentile `fraction` of the time to the last byte of complete streams."""
        return 1000 * percentile([stream.whole_s for stream in self.served], fraction)

    def first_ms(self, fraction: float) -> float:
        """Return the percentile `fraction` of the time to the first byte of complete streams."""
        return 1000 * percentile([stream.first_s for stream in self.served], fraction)


class Loader:
    """A client of some gateways; created by `loading`."""

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], bodies: Iterable[dict[str, Any]]) -> None:
        self._session = session
        self._urls = urls
        self._bodies = map(orjson.dumps, bodies)

    async def stream(self, url: str) -> Stream:
        """Request the next stream, and read it without delay."""
        body = next(self._bodies)
        start_s = time.perf_counter()
        status, error, first_s, chunks, tail = BROKEN, "", 0.0, 0, b""
        try:
            async with self._session.post(f"{url}/generate", data=body) as response:
                if response.status != 200:
                    error = (await response.json())["error"]["code"]
                async for data in response.content.iter_any():
                    first_s = first_s or time.perf_counter() - start_s
                    chunks += data.count(b"data: ")
                    tail = (tail + data)[-len(DONE) :]
                status = BROKEN if response.status == 200 and tail != DONE else response.status
        except (aiohttp.ClientError, OSError) as failure:
            error = repr(failure)
        return Stream(status, error, first_s, time.perf_counter() - start_s, chunks)

    async def closed(self, clients: int, seconds: float, on_stream: OnStream = lambda _: None) -> Load:
        """Run a closed loop: clients ask again after each answer, and stop after the answer at `seconds`.

        Each client asks one gateway; the clients are distributed evenly.
        """
        streams: list[Stream] = []
        start_s = time.perf_counter()

        async def client(url: str) -> None:
            while time.perf_counter() < start_s + seconds:
                streams.append(await self.stream(url))
                on_stream(streams[-1])

        await asyncio.gather(*map(client, itertools.islice(itertools.cycle(self._urls), clients)))
        return Load(streams, time.perf_counter() - start_s)

    async def open(self, per_s: float, seconds: float, on_stream: OnStream = lambda _: None, *, seed: int = 0) -> Load:
        """Send a request at once and more as a Poisson process, to the gateways in turn, whatever the answers take."""
        chance, under_way, urls = random.Random(seed), [], itertools.cycle(self._urls)
        start_s = next_s = time.perf_counter()
        while next_s < start_s + seconds:
            await sleep_until(next_s)
            next_s += chance.expovariate(per_s)
            under_way.append(asyncio.create_task(self.stream(next(urls))))
            under_way[-1].add_done_callback(lambda task: on_stream(task.result()))
        return Load(await asyncio.gather(*under_way), time.perf_counter() - start_s)


def user_bodies(tokens: int, users: int) -> Iterator[dict[str, Any]]:
    """Yield requests of the users in turn, with distinct prompts."""
    for number in itertools.count():
        user, prompt = f"user-{number % users}", f"Write the sentence number {number}."
        yield {"user_id": user, "prompt": prompt, "max_tokens": tokens, "stream": True, "history": 0}


@contextmanager
def gateways_with_users(
    bank: Path,
    store: ValkeyProcess,
    engine: Engine,
    users: int,
    *,
    gateways: int = 1,
    keys: Sequence[str | None] = (None,),
    **settings: object,
) -> Iterator[list[str]]:
    """Run gateways until each finds all parts ready; each key knows `users` users with an item. Yield their URLs."""
    with ExitStack() as stack:
        running = (running_gateway(bank, store.url, engine.url, **settings) for _ in range(gateways))
        urls = [stack.enter_context(gateway).url for gateway in running]
        for url in urls:
            with Client(url, key=keys[0]) as client:
                wait_until(client.ready, f"{url} to be ready")
        for key in keys:
            with Client(urls[0], key=key) as client:
                for user in range(users):
                    client.put_profile(f"user-{user}", [world(user)])
        yield urls


@asynccontextmanager
async def loading(
    urls: Sequence[str], bodies: Iterable[dict[str, Any]], key: Mapping[str, str] = NO_KEY
) -> AsyncIterator[Loader]:
    """Yield a loader with its own connections; `key` is the header with its API key."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    headers = {"Content-Type": "application/json", **key}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        yield Loader(session, urls, bodies)


@asynccontextmanager
async def reading(
    urls: Sequence[str], path: str, body: dict[str, Any], per_s: float, key: Mapping[str, str] = NO_KEY
) -> AsyncIterator[None]:
    """Run a client of each URL that asks repeatedly, and reads `per_s` bytes per second, or none.

    Its buffers are small, so that unread data waits in the gateway.
    """
    raw = orjson.dumps(body)
    clients = [asyncio.create_task(_reader(url, path, raw, per_s, key)) for url in urls]
    try:
        yield
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _reader(url: str, path: str, body: bytes, per_s: float, key: Mapping[str, str]) -> None:
    address = urlsplit(url)
    head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in key.items())
    while True:
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.setblocking(False)
            await asyncio.get_running_loop().sock_connect(plain, (address.hostname, address.port))
            reader, writer = await asyncio.open_connection(sock=plain, limit=4096)
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            try:
                while True:
                    if per_s == 0:
                        await asyncio.sleep(RECONNECT_AFTER_S)
                        break
                    if not await reader.read(max(1, round(per_s / 10))):
                        break
                    await asyncio.sleep(0.1)
            except OSError:
                pass
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.1)
