"""What the engine says about a conversation: its length in tokens, and whether the model's chat template accepts it."""

from __future__ import annotations

import secrets
from typing import Any

import aiohttp
import orjson

from server.engine_protocol import BASE_MODEL, key_header
from server.errors import Unavailable
from server.gateway.engines.admin import Engines

TIMEOUT_S = 5.0
"""Longest wait for an answer about one conversation, which costs the engine milliseconds."""


class TokenizerClient:
    """Asks an engine with vLLM's `/tokenize`, and a second one if need be.

    Each is asked directly: a router would ask the first of its engines, whether it can be reached or not.

    Args:
        session: the process's one HTTP session.
        engines: all of them.
        key: the key they require, or None.
    """

    def __init__(self, session: aiohttp.ClientSession, engines: Engines, key: str | None) -> None:
        self._session = session
        self._engines = engines
        self._headers = {"Content-Type": "application/json"} | key_header(key)

    async def count(self, messages: list[dict[str, str]]) -> int | None:
        """Length of a conversation in tokens; None if the engine cannot say, or not in time."""
        try:
            status, answer = await self._ask(messages)
            return int(answer["count"]) if status == 200 else None
        except (Unavailable, KeyError, TypeError, ValueError):
            return None

    async def refusal(self, messages: list[dict[str, str]]) -> str | None:
        """Why the model's chat template refuses a conversation; None if it accepts it.

        Args:
            messages: ending with the answer, as training renders them.

        Raises:
            Unavailable: when the engine cannot say, or not in time.
        """
        status, answer = await self._ask(messages)
        if status == 400:
            try:
                return str(answer["error"]["message"])
            except (KeyError, TypeError) as error:
                raise Unavailable("the engine refused without a reason", code="engine_unavailable") from error
        if status == 200:
            return None
        raise Unavailable(f"the engine answered {status} to /tokenize", code="engine_unavailable")

    async def _ask(self, messages: list[dict[str, str]]) -> tuple[int, Any]:
        """Status and body of the answer."""
        first, *others = self._engines.places(secrets.token_hex(4))
        try:
            return await self._ask_at(first, messages)
        except Unavailable:
            if not others:
                raise
            return await self._ask_at(others[0], messages)

    async def _ask_at(self, url: str, messages: list[dict[str, str]]) -> tuple[int, Any]:
        body = orjson.dumps({"model": BASE_MODEL, "messages": messages, "add_generation_prompt": False})
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with self._session.post(
                f"{url}/tokenize", data=body, headers=self._headers, timeout=timeout
            ) as response:
                return response.status, orjson.loads(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise Unavailable("the engine cannot be reached now", code="engine_unavailable") from error
