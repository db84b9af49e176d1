"""The state of each part: probed every few seconds in the background, and never on request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from server.errors import ApiError
from server.gateway.engines.admin import AddressState, Engines, EngineState
from server.store.durability import CheckedStore, Durability
from server.watching.repeating import forever

log = logging.getLogger("mta.gateway")

PROBE_INTERVAL_S = 2.0
FIRST_INTERVAL_S = 0.25
"""Until all was ready once: whoever starts the server is waiting for that."""

PROBE_TIMEOUT_S = 2.0
STALE_AFTER_S = 15.0
"""A round of probes takes 4 s at most, so an older report means that the watch hangs or has died."""


class Readiness(StrEnum):
    """Whether requests can be fully served."""

    READY = "ready"
    NOT_READY = "not_ready"
    NOT_YET_SEEN = "not_yet_seen"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class StoreState:
    """The store's state; `detail` says in a sentence what is wrong with it."""

    status: str
    durability: Durability
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """One look at every part that can fail while the gateway runs. Bank and embedder were checked at startup.

    Attributes:
        generating: the address that generations are sent to.
        engines: every engine on its own.
        seen_s: when the look ended, by the monotonic clock.
    """

    store: StoreState
    generating: AddressState
    engines: tuple[EngineState, ...]
    seen_s: float

    @property
    def age_s(self) -> float:
        """How long ago the look ended."""
        return time.monotonic() - self.seen_s

    @property
    def readiness(self) -> Readiness:
        """Whether requests can be fully served; one engine that has the bank is enough, and a router can be missed."""
        if self.age_s > STALE_AFTER_S:
            return Readiness.STALE
        served = any(engine.status == "ok" for engine in self.engines)
        return Readiness.READY if served and self.store.status == "ok" else Readiness.NOT_READY

    @property
    def missing(self) -> str | None:
        """What is missing while requests are served all the same, in a sentence; None if nothing is."""
        if self.readiness is not Readiness.READY:
            return None
        down = sum(engine.status != "ok" for engine in self.engines)
        said = [f"{down} of {len(self.engines)} engines cannot be used, and the others serve"] if down else []
        if self.generating.status != "ok":
            said.append("MTA_ENGINE_URL cannot be used, and engines are asked directly")
        return "; ".join(said) or None


class Health:
    """Watches the parts.

    Args:
        store: where users are kept.
        engines: all engines.
        fingerprint: of the bank that they must serve.
        generating: the address that generates: an engine's or a router's.
    """

    def __init__(self, store: CheckedStore, engines: Engines, fingerprint: str, *, generating: str) -> None:
        self._store = store
        self._engines = engines
        self._fingerprint = fingerprint
        self._generating = generating.rstrip("/")
        self.last: Report | None = None
        self._was_ready = False

    @property
    def readiness(self) -> Readiness:
        """Whether requests could be fully served at the last look; nothing is probed."""
        return self.last.readiness if self.last else Readiness.NOT_YET_SEEN

    async def probe(self) -> Report:
        """Probe every part now."""
        store, engines, router = await asyncio.gather(self._ask_store(), self._ask_engines(), self._ask_router())
        self.last = Report(store, router or self._as_address(engines), engines, time.monotonic())
        self._was_ready |= self.readiness is Readiness.READY
        return self.last

    async def watch(self) -> None:
        """Probe for ever."""
        await forever(lambda: PROBE_INTERVAL_S if self._was_ready else FIRST_INTERVAL_S, self.probe, log)

    async def _ask_store(self) -> StoreState:
        try:
            durability = await self._store.check()
        except ApiError as error:
            return StoreState("unavailable", self._store.durability, error.explained)
        if durability is Durability.NONE:
            return StoreState("ok", durability, "acknowledged writes can be lost: MTA_REQUIRE_DURABLE_STORE is false")
        return StoreState("ok", durability)

    async def _ask_engines(self) -> tuple[EngineState, ...]:
        return tuple(map(self._judged, await self._engines.states(PROBE_TIMEOUT_S)))

    def _judged(self, state: EngineState) -> EngineState:
        """The engine's own state, unless it is `ok` but lacks the bank."""
        if state.status != "ok" or self._fingerprint in state.banks:
            return state
        served = [bank[:8] for bank in state.banks]
        detail = f"it serves the banks {served}, but this gateway uses {self._fingerprint[:8]}"
        return replace(state, status="other_bank", detail=detail)

    async def _ask_router(self) -> AddressState | None:
        """The router's state; None if generations go straight to an engine."""
        if self._generating in self._engines.urls:
            return None
        return await self._engines.router_state(self._generating, PROBE_TIMEOUT_S)

    def _as_address(self, engines: Sequence[EngineState]) -> AddressState:
        """The state of the engine that generates, which has been probed already."""
        state = engines[self._engines.urls.index(self._generating)]
        return AddressState(state.url, state.status, state.detail)
