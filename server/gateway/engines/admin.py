"""The private routes of every engine, called directly and never through a router.

Every failure becomes an `EngineFault` here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

import aiohttp
import orjson

from adapters.errors import MtaError
from server.engine_protocol import DROP, STATUS, key_header

log = logging.getLogger("mta.gateway")

ROUTER_PATHS = ("/readiness", "/health")
"""A router is ready while one of its engines is, and healthy only while all are; others know only the second path."""

DROP_TIMEOUT_S = 5.0


class EngineFault(MtaError):
    """Why an address did not answer as it should; `status` is `unavailable`, `wrong_key` or `not_an_mta_engine`."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True)
class EngineState:
    """What one engine says about itself.

    Attributes:
        status: `ok`, or what is wrong, in a word.
        detail: what is wrong, in a sentence.
        max_model_len: its context in tokens, where known.
        banks: fingerprints (64 hex digits) of the banks that it serves.
    """

    url: str
    status: str
    detail: str | None = None
    max_model_len: int | None = None
    banks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What one engine says of its adapters and batches; None where it does not.

    Attributes:
        slots: adapters that one batch can mix.
        slots_taken: how many of the slots hold one.
        prepares: requests that it made an adapter ready for.
        fuses: how many of them had to wait until it was fused.
        max_num_seqs: sequences that one batch holds.
    """

    slots: int | None = None
    slots_taken: int | None = None
    prepares: int | None = None
    fuses: int | None = None
    max_num_seqs: int | None = None

    @property
    def sequences(self) -> int:
        """Sequences that are computed at once even if each has a recipe of its own; 0 where nobody knows."""
        batch = self.max_num_seqs or 0
        return min(batch, self.slots or batch)


@dataclass(frozen=True, slots=True)
class AddressState:
    """The state of the address that generates: an engine, or the router in front of several."""

    url: str
    status: str
    detail: str | None = None


class Engines:
    """All engines that the gateway knows.

    Attributes:
        answering: the URLs of those that were well when last asked.
        context: the model's context in tokens, the shortest that engines last reported; None until one has.
        sequences: how many the engines compute at once whatever their recipes, all that answer; as last known if none
            does, None before.
        figures: what each engine last said of its adapters and batches, in the order of `urls`; None while it says
            nothing.
    """

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], key: str | None) -> None:
        self._session = session
        self._headers = key_header(key)
        self.urls = tuple(urls)
        self.answering: tuple[str, ...] = ()
        self.context: int | None = None
        self.sequences: int | None = None
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
                status, _ = await self.request("GET", url + path, timeout_s)
            except EngineFault as fault:
                return AddressState(url, fault.status, str(fault))
            if status != 404:
                break
        if status != 200:
            return AddressState(url, "unavailable", f"it answered {status} to {path}")
        return AddressState(url, "ok")

    def by_preference(self, thing: str) -> tuple[str, ...]:
        """Where to ask an engine directly: first the one that `thing` always goes to, then those that stand in for it.

        Those that were not well when last asked come last: since then they may have come back.
        """

        def order(url: str) -> tuple[bool, bytes]:
            return url not in self.answering, blake2b(f"{url} {thing}".encode(), digest_size=8).digest()

        return tuple(sorted(self.urls, key=order))

    async def drop(self, user_key: str) -> None:
        """Have every engine drop a user's adapters; failures are logged."""
        await asyncio.gather(*(self._drop(url, user_key) for url in self.urls))

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

    async def _drop(self, url: str, user_key: str) -> None:
        try:
            await self._ask("POST", url, DROP, DROP_TIMEOUT_S, {"user_key": user_key})
        except EngineFault as fault:
            log.warning("the engine at %s could not be told to drop an adapter: %s", url, fault)

    async def _ask(self, method: str, url: str, route: str, timeout_s: float, body: object = None) -> bytes:
        """The body of a private route's answer; raises `EngineFault` when the status is not 200."""
        status, raw = await self.request(method, url + route, timeout_s, body)
        if status in (401, 403):
            raise EngineFault("wrong_key", "it refused the gateway's key: MTA_ENGINE_KEY differs")
        if status == 404:
            raise EngineFault("not_an_mta_engine", f"it has no {route}: the plugin is not loaded")
        if status != 200:
            raise EngineFault("unavailable", f"it answered {status}")
        return raw

    async def request(self, method: str, url: str, timeout_s: float, body: object = None) -> tuple[int, bytes]:
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
