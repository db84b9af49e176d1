"""A running server as benchmarks use it: its API key, its metrics, its streams, and a wait for signatures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiohttp
import httpx

from mta_client import Client
from server.engine_protocol import key_header

PATIENCE_S = 120.0
"""Maximum seconds for one user's signature; another user's job may come first."""

POLL_S = 0.5


def authorization() -> dict[str, str]:
    """Return the header with the API key from MTA_API_KEY, empty without one."""
    return key_header(os.environ.get("MTA_API_KEY"))


def summed(metrics: str, name: str) -> float:
    """Return a time series of the text of `/metrics`, or the sum over all labels if `name` has none; 0 if not there."""
    samples = (line for line in metrics.splitlines() if line.startswith((f"{name} ", f"{name}{{")))
    return sum(float(line.rpartition(" ")[2]) for line in samples)


def until_signed(client: Client, users: Iterable[str]) -> set[str]:
    """Wait until users are served by their signatures, if the bank has them; return those who are served by topic.

    The wait ends when nobody got a signature for `PATIENCE_S`, since some texts give none.
    """
    left, last_s = set(users), time.monotonic()
    answer = httpx.get(f"{client.url}/bank", headers=authorization(), timeout=60)
    if answer.raise_for_status().json()["rule"]["name"] == "topic":
        return left
    while left and time.monotonic() < last_s + PATIENCE_S:
        signed = {user for user in left if client.user(user).source == "signature"}
        if signed:
            left, last_s = left - signed, time.monotonic()
        else:
            time.sleep(POLL_S)
    return left


async def stream_chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a stream as they arrive; RuntimeError if the stream breaks."""
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        chunk: dict[str, Any] = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(f"a stream broke: {chunk['error']}")
        yield chunk


def has_text(chunk: dict[str, Any]) -> bool:
    """Whether a chunk of a stream has text, as the first and the last have not."""
    return bool(chunk["choices"] and chunk["choices"][0]["delta"].get("content"))
