"""Measure the cost of a personal answer for an app: through a gateway, with and without personalisation, in turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import aiohttp
from tokenizers import Tokenizer

from bench.rig.engine import KEY, Engine
from bench.rig.subject import Subject
from bench.rig.up import gateway_url, running_gateway
from bench.rig.valkey import ValkeyProcess
from bench.serving.gateway import ITEMS, USER, Side
from mta_client import Client

WORDS = ("sea", "wind", "stone", "river", "bread", "letter", "garden", "winter", "music", "paper", "road", "window")
SECRET = "a secret of the benchmarks alone"


def through_gateway(
    subject: Subject, engine: Engine, folder: Path, tokens: int, pairs: int
) -> tuple[list[float], list[float]]:
    """Measure pairs of first tokens through a gateway with a running engine, in ms: without and with a person."""
    with (
        ValkeyProcess(folder) as store,
        running_gateway(subject.bank, store.url, engine.url, KEY, SECRET) as process,
    ):
        url = gateway_url(process)
        with Client(url) as client:
            client.put_profile(USER, ITEMS)
        sampling = {"max_tokens": 1, "temperature": 0, "user_id": USER}  # the answer is only the first token
        nobody, person = (
            Side(f"{url}/generate", {}, sampling | {"personalize": level}, False) for level in ("none", "merged")
        )
        return asyncio.run(_in_turn(nobody, person, texts(subject.model, tokens), pairs))


def texts(model: Path, tokens: int) -> Callable[[], str]:
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
