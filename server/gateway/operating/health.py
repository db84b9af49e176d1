"""The state of each part, probed in the background and never by a request."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from bank.manifest import BaseModelId
from server.errors import ApiError
from server.gateway.engines.admin import AddressState, Engines, EngineState
from server.observability.background import forever
from server.store.durability import CheckedStore, Durability

log = logging.getLogger("mta.gateway")

PROBE_INTERVAL_S = 2.0
STARTUP_PROBE_INTERVAL_S = 0.25  # until the gateway is ready for the first time: someone is waiting for it to start
PROBE_TIMEOUT_S = 2.0
STALE_AFTER_S = 15.0  # a round of probes takes at most 4 s: the probe loop hangs or has ended

_FULL, _PARTIAL = "full", "partial"
_USABLE = ("ok", _PARTIAL, _FULL)  # a full store still reads and erases, and a partial one serves most users


class Readiness(StrEnum):
    READY = "ready"
    NOT_READY = "not_ready"
    NOT_YET_SEEN = "not_yet_seen"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class StoreState:
    """The store's state: `ok`, `partial` (serves most users), `full` or `unavailable`; `detail` gives the reason."""

    status: str
    durability: Durability
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Unseen:
    """A part that has not been probed yet."""

    status: Literal[Readiness.NOT_YET_SEEN] = Readiness.NOT_YET_SEEN


@dataclass(frozen=True, slots=True)
class BankPart:
    """The bank, checked at startup; recipes begin with the first 8 hex digits of its fingerprint."""

    fingerprint: str
    task: str
    anchors: int
    status: Literal["ok"] = "ok"


@dataclass(frozen=True, slots=True)
class EmbedderPart:
    """The embedder, checked at startup."""

    id: str
    dim: int
    status: Literal["ok"] = "ok"


@dataclass(frozen=True, slots=True)
class PartStates:
    bank: BankPart
    embedder: EmbedderPart
    redis: StoreState | Unseen
    engine_url: AddressState | Unseen
    engines: tuple[EngineState, ...]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The state of every part that can fail while the gateway runs."""

    store: StoreState
    generating: AddressState  # the engine or router that generations are sent to
    engines: tuple[EngineState, ...]
    lacking: tuple[str, ...]  # fingerprints of this gateway's banks that no engine serves
    probed_s: float  # end of the probes, by the monotonic clock

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.probed_s

    @property
    def readiness(self) -> Readiness:
        """Readiness needs one engine per bank; a router may be down."""
        if self.age_s > STALE_AFTER_S:
            return Readiness.STALE
        return Readiness.NOT_READY if self.lacking or self.store.status not in _USABLE else Readiness.READY

    @property
    def missing(self) -> str | None:
        """A description of what is missing although the gateway is ready; None if nothing is."""
        if self.readiness is not Readiness.READY:
            return None
        partly = sum(engine.status == "lacks_bank" for engine in self.engines)
        expected = sum(engine.status == "expected" for engine in self.engines)
        down = sum(engine.status != "ok" for engine in self.engines) - partly - expected
        problems = [f"store_full: {self.store.detail}"] if self.store.status == _FULL else []
        if expected:
            problems.append(f"{len(self.engines) - expected} of {len(self.engines)} expected engines have appeared")
        if down:
            problems.append(f"{down} of {len(self.engines)} engines cannot be used, the others serve")
        if partly:
            problems.append(f"{partly} of {len(self.engines)} engines lack a bank that another engine has")
        if self.generating.status != "ok":
            problems.append("MTA_ENGINE_URL cannot be used, the gateway calls engines directly")
        if self.store.status == _PARTIAL and self.store.detail:
            problems.append(self.store.detail)
        return "; ".join(problems) or None


@dataclass(eq=False)
class Health:
    store: CheckedStore
    engines: Engines
    banks: dict[str, BaseModelId]  # that the engines must serve, by fingerprint, with the models they are for
    generating: str  # URL that generations are sent to, without a slash at its end
    last: ProbeResult | None = None
    _was_ready: bool = False
    _logged: tuple[str, ...] = ()

    @property
    def readiness(self) -> Readiness:
        return self.last.readiness if self.last else Readiness.NOT_YET_SEEN

    async def probe(self) -> ProbeResult:
        store, states, router = await asyncio.gather(
            self._probe_store(), self.engines.probe(PROBE_TIMEOUT_S), self._probe_router()
        )
        engines = tuple(self._with_bank_status(state) if state.status == "ok" else state for state in states)
        lacking = tuple(bank for bank in self.banks if not any(bank in engine.banks for engine in engines))
        self._log_lacking(lacking if any(engine.banks for engine in engines) else ())
        generating = router or engines[self.engines.urls.index(self.generating)]
        self.last = ProbeResult(store, generating, engines, lacking, time.monotonic())
        self._was_ready |= self.readiness is Readiness.READY
        return self.last

    async def watch(self) -> None:
        await forever(lambda: PROBE_INTERVAL_S if self._was_ready else STARTUP_PROBE_INTERVAL_S, self.probe, log)

    def _log_lacking(self, lacking: tuple[str, ...]) -> None:
        if lacking and lacking != self._logged:
            log.error(
                "not ready: engines respond, but none of them has the bank %s: set MTA_BANK or MTA_NEXT_BANK of an "
                "engine to its folder, or remove it from the gateway's settings",
                ", ".join(bank[:8] for bank in lacking),
            )
        self._logged = lacking

    async def _probe_store(self) -> StoreState:
        try:
            durability = await self.store.check()
        except ApiError as error:
            return StoreState("unavailable", self.store.durability, error.explained)
        unserved = self.store.unserved
        if (memory := self.store.memory) and memory.full:
            no_room = (
                f"{memory.used_bytes >> 20} of {memory.max_bytes >> 20} MiB are used, and nothing new is stored; "
                "erasing users and revoking keys still work: free memory, or raise maxmemory (`mta up`: MTA_STORE_MIB)"
            )
            return StoreState(_FULL, durability, "; ".join(filter(None, (no_room, unserved))))
        if not durability.is_durable:
            return StoreState("ok", durability, "acknowledged writes can be lost: MTA_REQUIRE_DURABLE_STORE is false")
        return StoreState(_PARTIAL, durability, unserved) if unserved else StoreState("ok", durability)

    def _with_bank_status(self, state: EngineState) -> EngineState:
        for bank, base_model in self.banks.items():
            if other := bank in state.banks and base_model.unlike(state.prompts):
                detail = f"it has another {other} than bank {bank[:8]} was built with: start it with the bank's model"
                return replace(state, status="other_prompts", detail=detail, banks=())
        lacking = [bank[:8] for bank in self.banks if bank not in state.banks]
        if not lacking:
            return state
        status = "other_bank" if len(lacking) == len(self.banks) else "lacks_bank"
        served = [bank[:8] for bank in state.banks]
        detail = f"it serves the banks {served}, but not {', '.join(lacking)}, which this gateway uses"
        return replace(state, status=status, detail=detail)

    async def _probe_router(self) -> AddressState | None:
        """Probe the router; return None if generations go directly to an engine."""
        if self.generating in self.engines.urls:
            return None
        return await self.engines.probe_router(self.generating, PROBE_TIMEOUT_S)
