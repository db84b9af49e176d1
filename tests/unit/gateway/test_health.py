"""When a gateway is ready, by what its engines say; what it counts, with few labels."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from bank.manifest import BaseModelId
from server.gateway.engines.admin import EngineState
from server.gateway.operating.health import Health, Readiness
from server.gateway.operating.metrics import Metrics
from server.store.durability import Durability, Memory

ONE, OTHER = "a1" * 32, "b2" * 32
MODEL = BaseModelId(name="tiny", hash="")
NEVER: tuple[str, ...] = ("never",)


class Said:
    """Engines with these banks; None for one that is down, NEVER for one that has not come up yet."""

    def __init__(self, *banks: tuple[str, ...] | None) -> None:
        self.urls = tuple(f"http://engine-{place}" for place in range(len(banks)))
        self._banks = banks

    async def probe(self, timeout_s: float) -> tuple[EngineState, ...]:
        return tuple(self._state(url, has) for url, has in zip(self.urls, self._banks, strict=True))

    def _state(self, url: str, has: tuple[str, ...] | None) -> EngineState:
        if has is None or has is NEVER:
            return EngineState(url, "expected" if has else "unavailable")
        return EngineState(url, "ok", None, 512, has)


def store(memory: Memory | None = None, unserved: str | None = None) -> Any:
    check = AsyncMock(return_value=Durability.ALWAYS)
    return SimpleNamespace(durability=Durability.ALWAYS, unserved=unserved, memory=memory, check=check)


def watching(store: Any, *banks: tuple[str, ...] | None) -> Health:
    engines: Any = Said(*banks)
    return Health(store, engines, dict.fromkeys((ONE, OTHER), MODEL), generating=engines.urls[0])


async def test_an_engine_with_other_prompts_is_not_used() -> None:
    built_for = MODEL.model_copy(update={"prompts": {"chat template": "1", "tokenizer": "2"}})
    engines = Mock(urls=("http://engine",), probe=AsyncMock())
    health = Health(store(), engines, {ONE: built_for}, generating="http://engine")
    for template, status, readiness in (("1", "ok", Readiness.READY), ("3", "other_prompts", Readiness.NOT_READY)):
        prompts = {"chat template": template, "tokenizer": "2"}
        engines.probe.return_value = (EngineState("http://engine", "ok", None, 512, (ONE,), prompts=prompts),)
        found = await health.probe()
        assert (found.engines[0].status, found.readiness) == (status, readiness)
    assert f"another chat template than bank {ONE[:8]}" in str(found.engines[0].detail)


LACKING = "{} of 2 engines lack a bank that another engine has"
DIRECTLY = "MTA_ENGINE_URL cannot be used, the gateway calls engines directly"


@pytest.mark.parametrize(
    ("banks", "statuses", "ready", "missing"),
    [
        ([(ONE, OTHER)], ["ok"], True, None),
        (
            [(ONE, OTHER, "c3" * 32), None],
            ["ok", "unavailable"],
            True,
            "1 of 2 engines cannot be used, the others serve",
        ),
        (
            [(ONE, OTHER), NEVER, None, NEVER],
            ["ok", "expected", "unavailable", "expected"],
            True,
            "2 of 4 expected engines have appeared; 1 of 4 engines cannot be used, the others serve",
        ),
        ([NEVER, NEVER], ["expected", "expected"], False, None),
        ([(ONE, OTHER), (ONE,)], ["ok", "lacks_bank"], True, LACKING.format(1)),
        ([(ONE,), (OTHER,)], ["lacks_bank", "lacks_bank"], True, f"{LACKING.format(2)}; {DIRECTLY}"),
        ([(ONE,), (ONE,)], ["lacks_bank", "lacks_bank"], False, None),
        ([(ONE,), None], ["lacks_bank", "unavailable"], False, None),
        ([("c3" * 32,), ()], ["other_bank", "other_bank"], False, None),
        ([None], ["unavailable"], False, None),
    ],
)
async def test_ready_once_an_engine_has_each_bank(
    banks: Any, statuses: list[str], ready: bool, missing: str | None
) -> None:
    found = await watching(store(), *banks).probe()
    assert [engine.status for engine in found.engines] == statuses
    for engine in found.engines:
        assert engine.status != "other_bank" or str([bank[:8] for bank in engine.banks]) in str(engine.detail)
    assert found.readiness is (Readiness.READY if ready else Readiness.NOT_READY)
    assert found.missing == missing


@pytest.mark.parametrize(
    ("used", "most", "unserved", "status", "missing"),
    [
        (98, 100, None, "ok", ""),
        (99, 100, None, "full", "store_full: 99 of 100 MiB"),
        (120, 100, None, "full", "store_full: 120 of 100 MiB"),
        (99, 0, None, "ok", ""),
        (0, 0, "33% of all users cannot be served", "partial", "33% of all users cannot be served"),
    ],
)
async def test_a_full_or_partial_store_leaves_a_gateway_ready(
    used: int, most: int, unserved: str | None, status: str, missing: str
) -> None:
    found = await watching(store(Memory(used << 20, most << 20), unserved), (ONE, OTHER)).probe()
    assert (found.readiness, found.store.status) == (Readiness.READY, status)
    assert (found.missing or "").startswith(missing) and bool(found.missing) == bool(missing)


async def test_missing_bank_is_logged_once_while_engines_answer(caplog: pytest.LogCaptureFixture) -> None:
    health = watching(store(), None)
    engines: Any = health.engines
    for banks, lines in ((None, 0), ((ONE,), 1), ((ONE,), 1), ((ONE, OTHER), 1), ((ONE,), 2), ((OTHER,), 3)):
        engines._banks = (banks,)
        await health.probe()
        said = [line for line in caplog.messages if "has the bank" in line]
        assert len(said) == lines
    assert "has the bank b2b2b2b2:" in said[0]
    assert "has the bank a1a1a1a1:" in said[2]


def test_unnamed_tenants_share_a_label_and_status_sets_outcome() -> None:
    metrics = Metrics({"acme"})
    unseen = 'mta_generations_total{level="",outcome="unavailable",tenant="acme"} 0.0'
    assert unseen in metrics.text().decode()  # so that a first failure is an increase
    for tenant in ("acme", *(f"tenant-{n}" for n in range(100))):
        metrics.count_generation(tenant, "merged", 200, broken=False)
    assert [line for line in metrics.text().decode().splitlines() if "merged" in line and "created" not in line] == [
        'mta_generations_total{level="merged",outcome="answered",tenant="acme"} 1.0',
        'mta_generations_total{level="merged",outcome="answered",tenant="other"} 100.0',
    ]
    outcomes = {200: "answered", 400: "refused", 404: "refused", 429: "limited", 499: "gone", 503: "unavailable"}
    outcomes |= {500: "failed", 502: "failed"}
    for status in outcomes:
        metrics.count_generation("acme", str(status), status, broken=False)
    ended = re.findall(r'level="(\d+)",outcome="(\w+)"', metrics.text().decode())
    assert dict(ended) == {str(status): outcome for status, outcome in outcomes.items()}
