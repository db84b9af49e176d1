"""How each part is: asked every few seconds in the background, and never by whoever wants to know."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp
import orjson

from bank.lookup.serving import ServingBank
from server.engine_protocol import key_header
from server.errors import ApiError
from server.store.durability import CheckedStore, Durability
from server.watching import forever

log = logging.getLogger("mta.gateway")

STATUS_PATH = "/mta/v1/status"
ROUTER_PATH = "/health"
PROBE_INTERVAL_S = 2.0
PROBE_TIMEOUT_S = 2.0
STALE_AFTER_S = 15.0
"""A round of probes takes 4 s at most: what is older was left behind by a watch that hangs or is dead."""

_SILENT = f"no answer within {PROBE_TIMEOUT_S:g} s"


class Readiness(StrEnum):
    """Whether requests can be answered as they should be."""

    READY = "ready"
    NOT_READY = "not_ready"
    NOT_YET_SEEN = "not_yet_seen"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class EngineState:
    """What one engine says of itself.

    Attributes:
        url: which engine.
        status: `ok`, or what is wrong, in a word.
        detail: what is wrong, in a sentence; None when nothing is.
        max_model_len: its context in tokens, where known.
        banks: fingerprints (64 hex digits) of the banks that it serves.
    """

    url: str
    status: str
    detail: str | None = None
    max_model_len: int | None = None
    banks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AddressState:
    """How the address that generates is: an engine, or the router before many. Attributes as above."""

    url: str
    status: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class StoreState:
    """How the store is; `detail` as above."""

    status: str
    durability: Durability
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """One look at every part that can fail while the gateway runs. Bank and embedder were checked at start.

    Attributes:
        store: where users are.
        generating: the address that generations are sent to.
        engines: every engine by itself.
        seen_s: when the look ended, by the monotonic clock.
    """

    store: StoreState
    generating: AddressState
    engines: tuple[EngineState, ...]
    seen_s: float

    @property
    def age_s(self) -> float:
        """How long ago that was."""
        return time.monotonic() - self.seen_s

    @property
    def readiness(self) -> Readiness:
        """Whether a request can be answered as it should be; one engine that has the bank will do."""
        if self.age_s > STALE_AFTER_S:
            return Readiness.STALE
        reached = self.store.status == self.generating.status == "ok"
        served = any(engine.status == "ok" for engine in self.engines)
        return Readiness.READY if reached and served else Readiness.NOT_READY


class Health:
    """Looks after the parts.

    Args:
        store: the store.
        session: the HTTP session.
        urls: every engine by itself.
        key: what engines ask for.
        bank: whose fingerprint they must serve.
        generating: the address that generates: one of `urls`, or a router's.
    """

    def __init__(
        self,
        store: CheckedStore,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        key: str | None,
        bank: ServingBank,
        *,
        generating: str,
    ) -> None:
        self._store = store
        self._session = session
        self._generating = generating.rstrip("/")
        self._urls = tuple(urls)
        self._headers = key_header(key)
        self._fingerprint = bank.manifest.fingerprint
        self.last: Report | None = None
        self.context: int | None = None
        """The shortest context among the engines, in tokens; stays known while they are down."""

    @property
    def readiness(self) -> Readiness:
        """Whether requests can be answered as they should be, as far as is known now; nothing is asked."""
        return self.last.readiness if self.last else Readiness.NOT_YET_SEEN

    async def probe(self) -> Report:
        """Ask every part now."""
        asking = asyncio.gather(*map(self._ask_engine, self._urls))
        store, engines, router = await asyncio.gather(self._ask_store(), asking, self._ask_router())
        self.last = Report(store, router or self._as_address(engines), tuple(engines), time.monotonic())
        contexts = [engine.max_model_len for engine in engines if engine.max_model_len]
        self.context = min(contexts) if contexts else self.context
        return self.last

    async def watch(self) -> None:
        """Probe for ever."""
        await forever(PROBE_INTERVAL_S, self.probe, log)

    def _as_address(self, engines: Sequence[EngineState]) -> AddressState:
        """The engine that generates, which has said all about itself."""
        state = engines[self._urls.index(self._generating)]
        return AddressState(state.url, state.status, state.detail)

    async def _ask_router(self) -> AddressState | None:
        """How the router is; None where an engine of its own generates."""
        url = self._generating
        if url in self._urls:
            return None
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), self._session.get(f"{url}{ROUTER_PATH}") as response:
                if response.status == 200:
                    return AddressState(url, "ok")
                return AddressState(url, "unavailable", f"it answered {response.status} to {ROUTER_PATH}")
        except TimeoutError:
            return AddressState(url, "unavailable", _SILENT)
        except (aiohttp.ClientError, OSError) as error:
            return AddressState(url, "unavailable", str(error))

    async def _ask_store(self) -> StoreState:
        try:
            durability = await self._store.check()
        except ApiError as error:
            return StoreState("unavailable", self._store.durability, error.explained)
        if durability is Durability.NONE:
            return StoreState("ok", durability, "acknowledged writes can be lost: MTA_REQUIRE_DURABLE_STORE is false")
        return StoreState("ok", durability)

    async def _ask_engine(self, url: str) -> EngineState:
        try:
            async with (
                asyncio.timeout(PROBE_TIMEOUT_S),
                self._session.get(f"{url}{STATUS_PATH}", headers=self._headers) as response,
            ):
                if response.status != 200:
                    return _refused(url, response.status)
                return self._judged(url, orjson.loads(await response.read()))
        except TimeoutError:
            return EngineState(url, "unavailable", _SILENT)
        except (aiohttp.ClientError, OSError) as error:
            return EngineState(url, "unavailable", str(error))
        except (ValueError, TypeError, KeyError) as error:
            return EngineState(url, "not_an_mta_engine", f"its status makes no sense: {error}")

    def _judged(self, url: str, status: dict[str, Any]) -> EngineState:
        banks, context = tuple(map(str, status["banks"])), int(status["max_model_len"])
        if self._fingerprint in banks:
            return EngineState(url, "ok", None, context, banks)
        detail = f"it serves the banks {[bank[:8] for bank in banks]}, this gateway {self._fingerprint[:8]}"
        return EngineState(url, "other_bank", detail, context, banks)


def _refused(url: str, status: int) -> EngineState:
    if status in (401, 403):
        return EngineState(url, "wrong_key", "it refused the gateway's key: MTA_ENGINE_KEY differs")
    if status == 404:
        return EngineState(url, "not_an_mta_engine", f"it has no {STATUS_PATH}: the plugin is not loaded")
    return EngineState(url, "unavailable", f"it answered {status}")
