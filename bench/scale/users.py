"""Measure the memory per user and the speed of lookups with a million un-adapted users in a real Valkey.

The store's own encoder makes the records, under the users' own keys; they are written in pipelines. The first ones also
go through the store's `commit` and must have the same length. The server is as durable as that of `mta up`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import numpy as np
import redis
from rich.progress import Progress

from bank.lookup.signature import Signature
from bench.page.report import Figures, percentile
from bench.rig.processes import memory_mib, sleep_until
from bench.rig.subject import tiny
from bench.rig.up import SECRET, running_gateway
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from server.store.opening import open_stores
from server.store.profile_record import Profile, StoredSignature, encode_profile
from server.store.profiles import Change
from server.store.tenants.user_key import UserKeys

BATCH = 2000
COMMITTED = 200
"""Number of users that the store's `commit` writes first."""
SAMPLE = 2000
"""Number of users whose memory is measured."""
ARRIVALS_PER_S = 1000
CONCURRENCY = 16
ANCHORS = 50  # of the signatures' bank
ABSENT_ENGINE = "http://127.0.0.1:9"  # port 9, discard: nothing listens there


def measure(users: int, lookups: int, folder: Path, progress: Progress) -> Figures:
    """Write users, half of them with a signature, measure, and return a table with one row per figure."""
    subject = tiny(folder)
    keys = UserKeys(SECRET, Settings().tenant)
    with ValkeyProcess(folder / "valkey") as store:
        with redis.Redis.from_url(store.url) as raw:
            empty = raw.info("memory")["used_memory"]
            make = _maker(subject.manifest.embedder.id)
            asyncio.run(_commit(store.url, keys, make))
            committed = {name: raw.strlen(_key(keys, name)) for name in map(_name, range(COMMITTED))}
            start_s = time.perf_counter()
            _write(raw, keys, make, users, progress)
            written_s = time.perf_counter() - start_s
            if any(raw.strlen(_key(keys, name)) != size for name, size in committed.items()):
                raise RuntimeError("the records written in pipelines are not those that the store commits")
            memory = raw.info("memory")
            sizes = _sizes(raw, keys, users)
        alone, arriving, per_s = asyncio.run(_look_up(store.url, keys, users, lookups, progress))
        memory_after = _through_gateway(subject.bank, store.url, min(lookups, users), progress)
    kinds = {
        "without a signature": [n for n in sizes if not _is_signed(n)],
        f"with a signature over {ANCHORS} anchors": [n for n in sizes if _is_signed(n)],
    }
    lines: list[list[object]] = [
        [f"bytes of a user {kind}: mean", fmean(sizes[n] for n in found)] for kind, found in kinds.items()
    ]
    lines += [
        ["bytes of the store for each user, keys and overhead and all", (memory["used_memory"] - empty) / users],
        ["resident memory of the store, MiB", memory["used_memory_rss"] / 2**20],
        ["users written a second, in pipelines, every write on disk", users / written_s],
    ]
    for how, taken in (("one after the other", alone), (f"arriving {ARRIVALS_PER_S:,} a second", arriving)):
        lines += [
            [f"lookups {how}: p{round(100 * fraction)}, ms", percentile(taken, fraction)] for fraction in (0.5, 0.99)
        ]
    lines.append([f"lookups a second by one client process, {CONCURRENCY} at a time", per_s])
    lines += [[f"a gateway's memory after {seen:,} different users, MiB", mib] for seen, mib in memory_after.items()]
    title = f"{users:,} users in Valkey, 50 % of them with a signature"
    return Figures(title, ("users", "figure"), lines)


def _name(number: int) -> str:
    return f"user-{number:08d}"


def _key(keys: UserKeys, name: str) -> str:
    return f"mta:{{{keys.key(name)}}}:profile"


def _is_signed(number: int) -> bool:
    """Whether a user has a signature."""
    return number % 2 == 0


def _maker(embedder: str) -> Callable[[int], Profile]:
    """Return a function that makes un-adapted profiles: the embedding of ten items, and perhaps a signature."""
    numbers = np.random.default_rng(0)
    vectors = numbers.standard_normal((512, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    products = numbers.standard_normal((512, ANCHORS)).astype(np.float32)

    def make(number: int) -> Profile:
        at = number % 512
        signature = None
        if _is_signed(number):
            signature = StoredSignature(Signature("0badcafe", 240, products[at]), made_of_ms=1_700_000_000_000)
        return Profile(_name(number), 10, 1_700_000_000_000, embedder, vectors[at], signature=signature)

    return make


async def _commit(url: str, keys: UserKeys, make: Callable[[int], Profile]) -> None:
    """Write the first users as the gateway does."""
    async with open_stores(Settings(redis_url=url)) as stores:
        for number in range(COMMITTED):
            change = Change(make(number), {}, {}, ())
            key = keys.key(_name(number))
            if not await stores.profiles.commit(key, b"", change, await stores.profiles.begin(key)):
                raise RuntimeError(f"{_name(number)} was there before")


def _write(raw: Any, keys: UserKeys, make: Callable[[int], Profile], users: int, progress: Progress) -> None:
    bar = progress.add_task("users written", total=users)
    for first in range(0, users, BATCH):
        batch = range(first, min(first + BATCH, users))
        with raw.pipeline(transaction=False) as pipe:
            for number in batch:
                pipe.set(_key(keys, _name(number)), encode_profile(make(number)))
            pipe.execute()
        progress.advance(bar, len(batch))


def _sizes(raw: Any, keys: UserKeys, users: int) -> dict[int, int]:
    """Return the `MEMORY USAGE` of some users, by number."""
    chosen = random.Random(1).sample(range(users), min(SAMPLE, users))
    with raw.pipeline(transaction=False) as pipe:
        for number in chosen:
            pipe.memory_usage(_key(keys, _name(number)), samples=0)
        return dict(zip(chosen, pipe.execute(), strict=True))


async def _look_up(
    url: str, keys: UserKeys, users: int, lookups: int, progress: Progress
) -> tuple[list[float], list[float], float]:
    """Look up random users by the store's own read path: return the ms of each in sequence, the ms of each in a Poisson
    process, and the rate of a closed loop."""
    chance, third = random.Random(2), lookups // 3
    bar = progress.add_task("lookups", total=3 * third)

    async with open_stores(Settings(redis_url=url)) as stores:

        async def look_up() -> float:
            key = keys.key(_name(chance.randrange(users)))
            start_s = time.perf_counter()
            profile = await stores.profiles.load(key)
            taken_ms = (time.perf_counter() - start_s) * 1000
            if profile is None:
                raise RuntimeError(f"{key} is not in the store")
            progress.advance(bar)
            return taken_ms

        alone = [await look_up() for _ in range(third)]
        under_way, next_s = [], time.perf_counter()
        for _ in range(third):
            next_s += chance.expovariate(ARRIVALS_PER_S)
            await sleep_until(next_s)
            under_way.append(asyncio.create_task(look_up()))
        arriving = await asyncio.gather(*under_way)

        async def client() -> None:
            for _ in range(third // CONCURRENCY):
                await look_up()

        start_s = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
        return alone, arriving, third // CONCURRENCY * CONCURRENCY / (time.perf_counter() - start_s)


def _through_gateway(bank: Path, url: str, users: int, progress: Progress) -> dict[int, float]:
    """Return a real gateway's memory in MiB after looking up a tenth of some users, and all, by their number."""
    memory_after = {}
    with (
        running_gateway(bank, url, ABSENT_ENGINE) as gateway,
        httpx.Client(base_url=gateway.url, timeout=30) as client,
    ):
        for number in progress.track(range(users), description="users through a gateway"):
            client.get(f"/users/{_name(number)}").raise_for_status()
            if (seen := number + 1) in (users // 10, users):
                memory_after[seen] = memory_mib(gateway.pid)
    return memory_after
