"""What the engine says about a conversation: its length in tokens, and whether the model's chat template accepts it."""

from __future__ import annotations

import secrets
from typing import Any

import orjson

from server.engine_protocol import BASE_MODEL
from server.errors import Unavailable
from server.gateway.engines.admin import EngineFault, Engines

TIMEOUT_S = 5.0
"""Longest wait for an answer about one conversation, which costs the engine milliseconds."""


class TokenizerClient:
    """Asks an engine with vLLM's `/tokenize`, and a second one if need be.

    Each is asked directly: a router would ask the first of its engines, whether it can be reached or not.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    async def count(self, messages: list[dict[str, str]]) -> int | None:
        """Length of a conversation in tokens; None if the engine cannot say, or not in time."""
        try:
            status, answer = await self._ask(messages)
            return int(answer["count"]) if status == 200 else None
        except (Unavailable, KeyError, TypeError, ValueError):
            return None

    async def refusal(self, messages: list[dict[str, str]]) -> str | None:
        """Why the model's chat template refuses a conversation that ends with the answer; None if it accepts it."""
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
        body = {"model": BASE_MODEL, "messages": messages, "add_generation_prompt": False}
        fault: Exception | None = None
        for url in self._engines.by_preference(secrets.token_hex(4))[:2]:
            try:
                status, raw = await self._engines.request("POST", f"{url}/tokenize", TIMEOUT_S, body)
                return status, orjson.loads(raw)
            except (EngineFault, ValueError) as error:
                fault = error
        raise Unavailable("the engine cannot be reached now", code="engine_unavailable") from fault
