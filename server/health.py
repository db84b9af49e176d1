"""How each part is: asked every few seconds, and again when `/ready` asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from bank.serving import ServingBank
from server.engine_client import bearer
from server.errors import ApiError
from server.store.durability import CheckedStore, Durability

log = logging.getLogger("mta.gateway")

STATUS_PATH = "/mta/v1/status"
PROBE_INTERVAL_S = 5.0
PROBE_TIMEOUT_S = 2.0


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
class StoreState:
    """How the store is; `detail` as above."""

    status: str
    durability: Durability
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """One look at every part that can fail while the gateway runs. Bank and embedder were checked at start."""

    store: StoreState
    engines: tuple[EngineState, ...]

    @property
    def ready(self) -> bool:
        """Whether a request can be answered as it should be."""
        return self.store.status == "ok" and all(engine.status == "ok" for engine in self.engines)


class Health:
    """Looks after the parts.

    Args:
        store: the store.
        session: the HTTP session.
        urls: every engine by itself.
        key: what engines ask for.
        bank: whose fingerprint they must serve.
    """

    def __init__(
        self,
        store: CheckedStore,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        key: str | None,
        bank: ServingBank,
    ) -> None:
        self._store = store
        self._session = session
        self._urls = tuple(urls)
        self._headers = bearer(key)
        self._fingerprint = bank.manifest.fingerprint
        self.last: Report | None = None
        self.context: int | None = None
        """The shortest context among the engines, in tokens; stays known while they are down."""

    async def probe(self) -> Report:
        """Ask every part now."""
        asking = asyncio.gather(*map(self._ask_engine, self._urls))
        store, engines = await asyncio.gather(self._ask_store(), asking)
        self.last = Report(store, tuple(engines))
        contexts = [engine.max_model_len for engine in engines if engine.max_model_len]
        self.context = min(contexts) if contexts else self.context
        return self.last

    async def watch(self) -> None:
        """Probe for ever; a fault of ours in one round does not end the watch."""
        while True:
            try:
                await self.probe()
            except Exception:
                log.exception("looking at the parts failed")
            await asyncio.sleep(PROBE_INTERVAL_S)

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
            return EngineState(url, "unavailable", f"no answer within {PROBE_TIMEOUT_S:g} s")
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
