"""What the gateway asks every engine directly, never through a router: status, drops, tokens.

Every failure becomes an `EngineFault` here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import aiohttp
import orjson

from adapters.errors import MtaError
from server.engine_protocol import BASE_MODEL, DROP, STATUS, key_header
from server.errors import Unavailable

log = logging.getLogger("mta.gateway")

ROUTER_PATHS = ("/readiness", "/health")
"""A router is ready while one of its engines is, and healthy only while all are; others know only the second path."""
DROP_TIMEOUT_S = 5.0
TOKENIZE_TIMEOUT_S = 5.0
"""Longest wait for an answer about one conversation, which costs the engine milliseconds."""


class EngineFault(MtaError):
    """Why an address did not answer as it should; `status` is `unavailable`, `wrong_key` or `not_an_mta_engine`."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True)
class AddressState:
    """The state of the address that generates: an engine, or the router in front of several."""

    url: str
    status: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class EngineState(AddressState):
    """What one engine says about itself; `status` is `ok`, or what is wrong."""

    max_model_len: int | None = None
    banks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What one engine says of its adapters and batches; None where it does not."""

    slots: int | None = None  # adapters that one batch can mix
    slots_taken: int | None = None
    prepares: int | None = None  # requests that it made an adapter ready for
    fuses: int | None = None  # those of them that had to wait for it
    max_num_seqs: int | None = None  # sequences that one batch holds

    @property
    def sequences(self) -> int:
        """Sequences that are computed at once even if each has a recipe of its own; 0 where nobody knows."""
        batch = self.max_num_seqs or 0
        return min(batch, self.slots or batch)


class Engines:
    """All engines that the gateway knows, and what they last said."""

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], key: str | None) -> None:
        self._session = session
        self._headers = key_header(key)
        self.urls = tuple(urls)
        self.answering: tuple[str, ...] = ()  # URLs of those that were well when last asked
        self.context: int | None = None  # the shortest in tokens that they last reported
        self.sequences: int | None = None  # computed at once by all that answer, whatever their recipes
        self.figures: list[EngineFigures | None] = [None] * len(self.urls)

    async def states(self, timeout_s: float) -> tuple[EngineState, ...]:
        """What each engine says about itself, in the order of `urls`; updates what is known of them."""
        states = await asyncio.gather(*(self._state(place, url, timeout_s) for place, url in enumerate(self.urls)))
        self.answering = tuple(state.url for state in states if state.status == "ok")
        told = [state.max_model_len for state in states if state.max_model_len]
        self.context = min(told, default=self.context)
        self.sequences = sum(figures.sequences for figures in self.figures if figures) or self.sequences
        return tuple(states)

    async def router_state(self, url: str, timeout_s: float) -> AddressState:
        """The state of a router."""
        for path in ROUTER_PATHS:
            try:
                status, _ = await self._request("GET", url + path, timeout_s)
            except EngineFault as fault:
                return AddressState(url, fault.status, str(fault))
            if status != 404:
                break
        if status != 200:
            return AddressState(url, "unavailable", f"it answered {status} to {path}")
        return AddressState(url, "ok")

    def by_preference(self, thing: str) -> tuple[str, ...]:
        """Where to ask directly: first the engine that `thing` always goes to, then those that stand in for it.

        Those that were not well when last asked come last: they may have come back since.
        """
        order = {url: blake2b(f"{url} {thing}".encode(), digest_size=8).digest() for url in self.urls}
        return tuple(sorted(self.urls, key=lambda url: (url not in self.answering, order[url])))

    async def drop(self, user_key: str) -> None:
        """Have every engine drop a user's adapters; failures are logged."""

        async def tell(url: str) -> None:
            try:
                await self._ask("POST", url, DROP, DROP_TIMEOUT_S, {"user_key": user_key})
            except EngineFault as fault:
                log.warning("the engine at %s could not be told to drop an adapter: %s", url, fault)

        await asyncio.gather(*map(tell, self.urls))

    async def count_tokens(self, messages: list[dict[str, str]]) -> int | None:
        """Length of a conversation in tokens; None if the engine cannot say, or not in time."""
        try:
            status, answer = await self._tokenize(messages)
            return int(answer["count"]) if status == 200 else None
        except (Unavailable, KeyError, TypeError, ValueError):
            return None

    async def template_refusal(self, messages: list[dict[str, str]]) -> str | None:
        """Why the model's chat template refuses a conversation that ends with the answer; None if it accepts it."""
        status, answer = await self._tokenize(messages)
        if status == 200:
            return None
        if status != 400:
            raise Unavailable(f"the engine answered {status} to /tokenize", code="engine_unavailable")
        try:
            return str(answer["error"]["message"])
        except (KeyError, TypeError) as error:
            raise Unavailable("the engine refused without a reason", code="engine_unavailable") from error

    async def _request(self, method: str, url: str, timeout_s: float, body: object = None) -> tuple[int, bytes]:
        """Status and body of an answer; raises `EngineFault` when none comes."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(method, url, json=body, headers=self._headers) as response,
            ):
                return response.status, await response.read()
        except TimeoutError as error:
            raise EngineFault("unavailable", f"no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineFault("unavailable", str(error)) from error

    async def _state(self, place: int, url: str, timeout_s: float) -> EngineState:
        figures = None
        try:
            answer = orjson.loads(await self._ask("GET", url, STATUS, timeout_s))
            banks, context = tuple(map(str, answer["banks"])), int(answer["max_model_len"])
            told = {field.name: answer.get(field.name) for field in fields(EngineFigures)}
            figures = EngineFigures(**{name: None if n is None else int(n) for name, n in told.items()})
        except EngineFault as fault:
            return EngineState(url, fault.status, str(fault))
        except (ValueError, TypeError, KeyError) as error:
            return EngineState(url, "not_an_mta_engine", f"its status makes no sense: {error}")
        finally:
            self.figures[place] = figures
        return EngineState(url, "ok", None, context, banks)

    async def _ask(self, method: str, url: str, route: str, timeout_s: float, body: object = None) -> bytes:
        """The body of a private route's answer; raises `EngineFault` when the status is not 200."""
        status, raw = await self._request(method, url + route, timeout_s, body)
        if status in (401, 403):
            raise EngineFault("wrong_key", "it refused the gateway's key: MTA_ENGINE_KEY differs")
        if status == 404:
            raise EngineFault("not_an_mta_engine", f"it has no {route}: the plugin is not loaded")
        if status != 200:
            raise EngineFault("unavailable", f"it answered {status}")
        return raw

    async def _tokenize(self, messages: list[dict[str, str]]) -> tuple[int, Any]:
        """Status and body of what one engine, or a second one if need be, answers to vLLM's `/tokenize`."""
        body = {"model": BASE_MODEL, "messages": messages, "add_generation_prompt": False}
        fault: Exception | None = None
        for url in self.by_preference(secrets.token_hex(4))[:2]:
            try:
                status, raw = await self._request("POST", f"{url}/tokenize", TOKENIZE_TIMEOUT_S, body)
                return status, orjson.loads(raw)
            except (EngineFault, ValueError) as error:
                fault = error
        raise Unavailable("the engine cannot be reached now", code="engine_unavailable") from fault
