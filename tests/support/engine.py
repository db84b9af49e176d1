"""Engines under test, real ones and the fake: what they are asked, and what is read of their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from adapters.errors import MtaError
from adapters.recipe import FusionMethod, FusionRecipe, Term
from bank.manifest import read_manifest
from bench.rig.engine import KEY
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import EngineClient, EngineRequest


def text_of(response: httpx.Response) -> str:
    """The text of a chat completion, which must have succeeded."""
    assert response.status_code == httpx.codes.OK, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Subject:
    """An engine under test."""

    url: str
    bank: Path  # folder of the bank that it serves
    generated: Callable[[], float]  # tokens so far
    idle: Callable[[], bool]  # whether it generates nothing now

    def recipe(self, **changes: Any) -> FusionRecipe:
        """A recipe that it can serve, unless changes make it another."""
        recipe = FusionRecipe(read_manifest(self.bank).short, FusionMethod.SHARED, True, (Term(0, 600), Term(3, 400)))
        return replace(recipe, **changes)


def client_of(session: aiohttp.ClientSession, url: str, key: str | None = KEY) -> EngineClient:
    """A client of an engine that stands alone."""
    return EngineClient(session, url, Engines(session, [url], KEY), key)


def ask(model: str, text: str = "hello there", *, max_tokens: int = 8, **sampling: Any) -> EngineRequest:
    return EngineRequest(
        request_id="gen-0123",
        model=model,
        messages=[{"role": "user", "content": text}],
        sampling={"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **sampling},
        prompt_param="prompt",
        cache_salt="a salt",
    )


async def answer(client: EngineClient, request: EngineRequest) -> str:
    async with client.generate(request) as stream:
        return "".join([text async for text, _ in stream])


async def refusal(client: EngineClient, request: EngineRequest, kind: type[MtaError]) -> Any:
    with pytest.raises(kind) as caught:
        await answer(client, request)
    return caught.value
