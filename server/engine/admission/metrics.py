"""What the engine's `/metrics` says of adapters: how many, and how long each step on their way takes.

The gauges replace `vllm:lora_requests_info`, which puts adapter names into label values: a time series for each
combination ever seen, and user keys in the monitoring. An operator only needs counts. Most durations are measured in
the worker; it is asked for them when somebody asks for `/metrics`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.v1.metrics.loggers import PrometheusStatLogger

from server.engine.admission.names import AdapterNames
from server.engine.fusing.figures import BUCKETS_S, Durations, Reading

log = logging.getLogger("mta.engine")

FRESH_S = 2.0
"""Longest time that `/metrics` waits for a worker amid a step; then it shows what the worker said before."""

DURATIONS = {
    "check": "From a recipe's name to its admission, without fetching its user adapter.",
    "fuse": "From an admitted recipe to its weights in memory, in whichever thread.",
    "slot_write": "Copying an adapter into a slot.",
    "bring_in": "What a step of the model waits for an adapter that is in no slot: the end of its making and the copy.",
    "load": "Reading and packing of an adapter that vLLM loads from a folder.",
}
COUNTS = {
    "fuses": "Recipes fused.",
    "slot_evictions": "Slots taken from one adapter for another.",
    "shared_slots": "Requests admitted while another one under the same recipe was open.",
}

PREPARES = "Requests that an adapter was made ready for: warm ones found it there, cold ones had it fused."


class AdaptersInUse:
    """Takes vLLM's calls to the gauge that it replaces, and publishes how many names they contain."""

    def __init__(self) -> None:
        self._in_use = Gauge("mta:adapters_in_use", "Distinct recipes among the engine's requests.")

    def labels(self, *, running_lora_adapters: str, **_: object) -> AdaptersInUse:
        """vLLM passes all its requests' adapters, comma-joined, as running and again as waiting."""
        names = running_lora_adapters
        self._in_use.set(names.count(",") + 1 if names else 0)
        return self

    def set_to_current_time(self) -> None:
        """Nothing to do: Prometheus timestamps samples itself."""


class AdapterFigures(Collector):
    """Publishes what this process and the first worker have measured.

    Args:
        ask: fetches the workers' `WorkerFigures.readings`.
        check: measured here.
        names: the names this process knows.
        slots: how many adapters one batch can mix.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[Any]], check: Durations, names: AdapterNames[Any], slots: int
    ) -> None:
        self._ask = ask
        self._check = check
        self._names = names
        self._slots = slots
        self._asking: asyncio.Task[Any] | None = None
        self._durations: dict[str, Reading] = {}
        self._counts: dict[str, int] = {}

    async def refresh(self) -> None:
        """Ask the workers; one question at a time, and not for long."""
        await asyncio.wait([self._question()], timeout=FRESH_S)

    def brief(self) -> dict[str, int]:
        """What a gateway shows: as the workers said when they were last asked; this asks them again, and waits not."""
        self._question()
        return {name: self._counts.get(name, 0) for name in ("prepares", "fuses")} | (
            {"slots_taken": self._counts["slots_taken"]} if "slots_taken" in self._counts else {}
        )

    def _question(self) -> asyncio.Task[Any]:
        """The question that the workers are being asked."""
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._answered())
        return self._asking

    async def _answered(self) -> None:
        try:
            self._durations, counts = (await self._ask())[0]
            self._counts = {**counts, "prepares": self._check.count}  # of the same moment: they are compared
        except Exception as error:
            log.debug("the workers did not say what they measured: %s", error)
        finally:
            self._asking = None

    def collect(self) -> Iterator[Metric]:
        """All of it, as Prometheus has it."""
        durations = {**self._durations, "check": self._check.reading}
        counts = {**self._counts, "shared_slots": self._names.shared}
        for name, text in DURATIONS.items():
            numbers, total_s = durations.get(name, ([0] * (len(BUCKETS_S) + 1), 0.0))
            ends = [*map(str, BUCKETS_S), "+Inf"]
            buckets = list(zip(ends, map(float, accumulate(numbers)), strict=True))
            yield HistogramMetricFamily(f"mta_engine_{name}_seconds", text, buckets=buckets, sum_value=total_s)
        for name, text in COUNTS.items():
            yield CounterMetricFamily(f"mta_engine_{name}", text, value=counts.get(name, 0))
        yield GaugeMetricFamily("mta_engine_slots", "LoRA slots.", self._slots)
        yield GaugeMetricFamily(
            "mta_engine_slots_resident", "Slots that hold an adapter.", counts.get("slots_taken", 0)
        )
        prepares = CounterMetricFamily("mta_engine_prepares", PREPARES, labels=("kind",))
        fused = counts.get("fuses", 0)
        prepares.add_metric(("cold",), fused)
        prepares.add_metric(("warm",), max(0, counts.get("prepares", 0) - fused))
        yield prepares


class Refreshing:
    """ASGI middleware: has the workers asked before `/metrics` is answered."""

    def __init__(self, app: ASGIApp, figures: Callable[[], AdapterFigures | None]) -> None:
        self._app = app
        self._figures = figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/metrics" and (figures := self._figures()) is not None:
            await figures.refresh()
        await self._app(scope, receive, send)


def install(engine_client: Any, names: AdapterNames[Any], check: Durations, slots: int) -> AdapterFigures:
    """Replace the gauge of a running engine client, and publish the size of its name map and all that is measured."""
    figures = AdapterFigures(lambda: engine_client.collective_rpc("mta_figures"), check, names, slots=slots)
    REGISTRY.register(figures)
    manager = engine_client.logger_manager
    in_use: AdaptersInUse | None = None
    for logger in manager.stat_loggers if manager is not None else ():
        if isinstance(logger, PrometheusStatLogger) and logger.gauge_lora_info is not None:
            REGISTRY.unregister(logger.gauge_lora_info)
            in_use = in_use or AdaptersInUse()
            logger.gauge_lora_info = in_use
    known = Gauge("mta:adapter_names", "Recipes whose engine id is remembered.")
    known.set_function(lambda: len(names))
    leased = Gauge("mta:adapter_names_leased", "Recipes that an open request holds.")
    leased.set_function(lambda: names.leased)
    return figures
