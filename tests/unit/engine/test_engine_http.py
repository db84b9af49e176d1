"""The engine's HTTP server: whom it opens to, how it stops, and what its `/metrics` shows of adapters."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, generate_latest

from bank.errors import BankError
from bench.rig.processes import PATIENCE_S
from server.engine.admission import metrics
from server.engine.admission.access import KEYED_ROUTES, PUBLIC_ROUTES, AccessMiddleware, Drain
from server.engine.admission.canary import check_canary
from server.engine.admission.endpoint import _refuse_unsafe
from server.engine.admission.metrics import AdapterMetrics, RefreshMetrics
from server.engine.admission.prepare import AdapterNames
from server.engine.fusing.metrics import FusionMetrics

KEYS = [b"first-key", b"second-key"]


async def knock(method: str, path: str, authorization: bytes | None = None, **changes: Any) -> int:
    send = AsyncMock()

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    headers = [] if authorization is None else [(b"authorization", authorization)]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers}
    gate = AccessMiddleware(behind, changes.pop("keys", lambda: KEYS), changes.pop("drain", Drain(0)))
    await gate(scope | changes, None, send)  # type: ignore[arg-type]
    (sent,) = send.await_args_list[0].args
    return int(sent.get("status", sent.get("code")))


@pytest.mark.parametrize(("method", "path"), sorted(KEYED_ROUTES))
async def test_product_route_opens_to_each_valid_key_only(method: str, path: str) -> None:
    for right in (scheme + key for scheme in (b"Bearer ", b"bearer ") for key in KEYS):
        assert await knock(method, path, right) == 200
    almost = (b"Bearer first-key ", b"Bearer FIRST-KEY", b"first-key", b"\xff\xfe")
    for wrong in (None, b"", b"Bearer", b"Bearer ", *almost):
        assert await knock(method, path, wrong) == 401
    assert await knock(method, path, b"Bearer ", keys=list) == 401


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "get"])
async def test_no_other_method_opens_with_a_key_or_without(method: str) -> None:
    for path in sorted({path for _, path in PUBLIC_ROUTES | KEYED_ROUTES}):
        assert await knock(method, path, b"Bearer first-key") == await knock(method, path) == 404


async def test_a_websocket_is_refused_as_soon_as_it_knocks() -> None:
    assert await knock("GET", "/health", type="websocket") == 1008


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"enable_lora": False}, "runs without LoRA"),
        ({"api_server_count": 2}, "--api-server-count is 2"),
        ({"lora_modules": ["ana=adapters/ana"]}, "--lora-modules takes ids"),
        ({"max_cpu_loras": 8}, "--max-cpu-loras is 8"),
        ({"max_lora_rank": 4}, "--max-lora-rank is 4: the bank needs at least 8"),
        ({"kv_transfer_config": "{}"}, "--kv-transfer-config does not know"),
        ({"kv_events_config": "{}"}, "--kv-events-config does not know"),
        ({"kv_offloading_size": 4.0}, "--kv-offloading-size does not know"),
        ({"specialize_active_lora": True}, "--specialize-active-lora counts no common recipe"),
    ],
)
def test_options_that_cannot_serve_recipes_end_the_start(changed: dict[str, Any], words: str) -> None:
    needed = {"enable_lora": True, "lora_modules": None, "max_loras": 8, "max_cpu_loras": 64, "max_lora_rank": 8}
    bank: Any = SimpleNamespace(serving_rank=8, shares_prompts=True)
    engine = AsyncMock(**{"vllm_config.use_v2_model_runner": False})
    _refuse_unsafe(engine, Namespace(**needed), ["key"], {"b": bank})
    with pytest.raises(BankError, match=words):
        _refuse_unsafe(engine, Namespace(**needed | changed), ["key"], {"b": bank})


async def test_a_bank_without_a_canary_is_served_and_the_log_says_so() -> None:
    before: Any = SimpleNamespace(canary=None, short="9f2c41d0")
    with patch("server.engine.admission.canary.log") as log:
        await check_canary(None, AsyncMock(), before, "float32")
    assert [call.args[1] for call in log.warning.call_args_list] == ["9f2c41d0"]


async def test_an_engine_that_is_to_stop_sends_everybody_on_to_another() -> None:
    drain = Drain(0, stop=lambda: None)
    assert await knock("GET", "/health", drain=drain) == 200
    drain.start()
    assert await knock("GET", "/health", drain=drain) == 503
    assert await knock("POST", "/v1/chat/completions", b"Bearer first-key", drain=drain) == 503
    assert await knock("POST", "/v1/chat/completions", b"Bearer wrong", drain=drain) == 401


@pytest.mark.parametrize("timeout_s", [10 * PATIENCE_S, 0.01])
async def test_drain_stops_when_requests_end_or_time_is_up(timeout_s: float) -> None:
    stopped = asyncio.Event()
    drain = Drain(timeout_s, stop=stopped.set)
    with drain.request():
        with drain.request():
            drain.start()
            drain.start()
        if timeout_s < 1:
            await asyncio.wait_for(stopped.wait(), PATIENCE_S)
            return
        for _ in range(10):
            await asyncio.sleep(0)
        assert not stopped.is_set()
    await asyncio.wait_for(stopped.wait(), PATIENCE_S)


class Worker:
    """Answers as a worker does, once `gate` is open; counts the questions."""

    def __init__(self) -> None:
        self.metrics, self.gate, self.asked = FusionMetrics(), asyncio.Event(), 0
        self.gate.set()
        self.failure: Exception | None = None
        self.names = AdapterNames({}, capacity=8, in_flight=set)
        self.published = AdapterMetrics(self.ask, self.names, slots=8)

    async def ask(self) -> list[Any]:
        self.asked += 1
        await self.gate.wait()
        if self.failure:
            raise self.failure
        return [(3, self.metrics.text), None]


@pytest.fixture
async def worker() -> Worker:
    return Worker()


def shown(figures: AdapterMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(figures)
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def test_what_was_measured_here_and_by_the_worker_is_shown(worker: Worker) -> None:
    worker.published.check.observe(0.00007)
    for seconds in (0.00001, 0.00005, 0.0006, 7.0):
        worker.metrics.fuse.observe(seconds)
    worker.metrics.evictions.inc(5)
    await worker.published.refresh()
    metrics = shown(worker.published)
    fuse = "mta_engine_fuse_seconds"
    buckets = [metrics[f'{fuse}_bucket{{le="{end}"}}'] for end in ("5e-05", "0.0005", "0.00075", "1.0", "+Inf")]
    assert (buckets, metrics[f"{fuse}_sum"]) == ([2, 2, 3, 3, 4], pytest.approx(7.00066))
    counts = ("check_seconds_count", "fuse_seconds_count", "fuses_total", "slot_evictions_total")
    assert [metrics[f"mta_engine_{count}"] for count in counts] == [1, 4, 4, 5]


async def test_everything_is_shown_before_a_worker_has_said_anything(worker: Worker) -> None:
    first = shown(worker.published)
    await worker.published.refresh()
    assert shown(worker.published).keys() == first.keys()
    assert not [name for name in first if "_created" in name]
    assert first.pop("mta_engine_slots") == 8
    assert not any(first.values())


async def test_requests_of_one_name_share_a_slot_and_are_counted(worker: Worker) -> None:
    for name in ("a", "b", "a", "a"):
        worker.names.lease(name)
    for name in ("a", "a", "a"):
        worker.names.release(name)
    worker.names.lease("a")
    worker.names.in_flight = lambda: {"a", "c", "d"}
    seen = shown(worker.published)
    assert seen["mta_engine_shared_slots_total"] == 2
    assert [seen[f"mta:adapter{what}"] for what in ("s_in_use", "_names", "_names_leased")] == [3, 2, 2]


async def test_a_busy_or_failing_worker_leaves_the_last_known_values(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REFRESH_TIMEOUT_S", 0.01)
    worker.metrics.load.observe(0.1)
    await worker.published.refresh()
    worker.gate.clear()
    worker.metrics.load.observe(0.1)
    await asyncio.gather(worker.published.refresh(), worker.published.refresh())
    await worker.published.refresh()
    assert shown(worker.published)["mta_engine_load_seconds_count"] == 1
    assert worker.asked == 2
    worker.gate.set()
    await worker.published.refresh()
    worker.failure = RuntimeError("the engine is dead")
    await worker.published.refresh()
    assert shown(worker.published)["mta_engine_load_seconds_count"] == 2


async def test_summary_gives_the_latest_figures_without_waiting(worker: Worker) -> None:
    worker.gate.clear()
    for figure in (worker.metrics.fuse, worker.published.check, worker.published.check):
        figure.observe(0.1)
    assert worker.published.summary() == {"prepares": 0, "fuses": 0}  # both as of the same moment
    worker.published.summary()
    worker.gate.set()
    await worker.published.refresh()
    assert worker.published.summary() == {"prepares": 2, "fuses": 1, "slots_taken": 3}
    await worker.published.refresh()
    assert worker.asked == 2


async def test_warm_counter_never_falls_when_fusion_follows_check(worker: Worker) -> None:
    warm = []
    for observed in (worker.published.check, worker.metrics.fuse, worker.published.check):
        observed.observe(0.1)
        await worker.published.refresh()
        warm.append(shown(worker.published)['mta_engine_prepares_total{kind="warm"}'])
    assert warm == [1, 1, 1]


@pytest.mark.parametrize(("path", "asked"), [("/metrics", 1), ("/v1/models", 0)])
async def test_the_worker_is_asked_when_metrics_are(worker: Worker, path: str, asked: int) -> None:
    async def app(*_: object) -> None:
        assert worker.asked == asked

    await RefreshMetrics(app, lambda: worker.published)({"type": "http", "path": path}, None, None)  # type: ignore[arg-type]
