"""Is a part ready? Each probe asks what the part's own clients will ask."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import aiohttp

from server.engine_protocol import key_header
from server.supervisor.guarded import newest_run
from server.supervisor.part import Probe

PROBE_TIMEOUT_S = 5.0


def answers_http(url: str, key: str | None = None) -> Probe:
    """Ready when GET `url` answers 200.

    Args:
        url: the complete URL.
        key: the engine's, where an engine is asked.
    """
    headers = key_header(key)

    async def ready() -> bool:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, headers=headers) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    return ready


def answers_redis(host: str, port: int, password: str) -> Probe:
    """Ready when PING answers PONG, which Valkey does once its append-only file is loaded."""

    async def ask() -> bool:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(f"AUTH {password}\r\nPING\r\n".encode())
            answers = [await reader.readline(), await reader.readline()]
            return answers == [b"+OK\r\n", b"+PONG\r\n"]
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def ready() -> bool:
        try:
            return await asyncio.wait_for(ask(), PROBE_TIMEOUT_S)
        except (OSError, TimeoutError):
            return False

    return ready


def writes(log: Path, text: str) -> Probe:
    """Ready when the part has written `text` to its log since it was last started."""

    def written() -> bool:
        return log.exists() and text in newest_run(log.read_bytes())

    async def ready() -> bool:
        return await asyncio.to_thread(written)

    return ready
