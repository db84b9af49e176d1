"""Adapter metrics on the engine's `/metrics`: counts, and durations of each stage, in the workers and the API process.

vLLM's `vllm:lora_requests_info` is removed, because its labels hold adapter names: unbounded, and with user keys.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.admission.prepare import AdapterNames
from server.engine.fusing.metrics import FusionMetrics, histogram

log = logging.getLogger("vllm.mta")

REFRESH_TIMEOUT_S = 2.0  # maximum time that `/metrics` waits for a busy worker before it returns the last known values


@dataclass(eq=False)
class AdapterMetrics(Collector):
    """Publishes the metrics of the API process and of the first worker; `ask` calls `measured` on all workers."""

    ask: Callable[[], Awaitable[Any]]
    names: AdapterNames
    slots: int  # maximum number of adapters in one batch
    _running_query: asyncio.Task[None] | None = None
    _registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _taken: int | None = None
    _warm: int = 0
    _worker_text: str = field(default_factory=lambda: FusionMetrics().text)

    def __post_init__(self) -> None:
        meaning = "Time to check and admit a recipe, without fetching its user adapter."
        self.check = histogram(self._registry, "check", meaning)

    async def refresh(self) -> None:
        """Ask the workers and wait briefly; concurrent calls share one query."""
        await asyncio.wait([self._query()], timeout=REFRESH_TIMEOUT_S)

    def summary(self) -> dict[str, int]:
        """Return the last known counts, and start a new query without waiting for it."""
        self._query()
        fuses = self._fuses()
        counts = {"prepares": fuses + self._warm, "fuses": fuses}
        return counts if self._taken is None else counts | {"slots_taken": self._taken}

    def _query(self) -> asyncio.Task[None]:
        if self._running_query is None:
            self._running_query = asyncio.ensure_future(self._ask_workers())
        return self._running_query

    async def _ask_workers(self) -> None:
        try:
            self._taken, self._worker_text = (await self.ask())[0]
            checks = self._registry.get_sample_value("mta_engine_check_seconds_count")
            # Who was checked and is not fused yet counts as warm until then, but a counter never falls.
            self._warm = max(self._warm, int(checks or 0) - self._fuses())
        except Exception as error:
            log.debug("cannot read the workers' metrics: %s", error)
        finally:
            self._running_query = None

    def _fuses(self) -> int:
        sample = re.search(r"^mta_engine_fuse_seconds_count (\S+)$", self._worker_text, re.MULTILINE)
        return int(float(sample[1])) if sample else 0

    def collect(self) -> Iterator[Metric]:
        for metric in text_string_to_metric_families(generate_latest(self._registry).decode() + self._worker_text):
            if not metric.name.endswith("_created"):  # creation times are not useful
                yield metric
        names, fuses = self.names, self._fuses()
        shared = "Requests admitted while another request with the same recipe was open."
        yield CounterMetricFamily("mta_engine_fuses", "Recipes fused.", fuses)
        yield CounterMetricFamily("mta_engine_shared_slots", shared, names.shared)
        for name, meaning, value in (
            ("mta_engine_slots", "LoRA slots.", self.slots),
            ("mta_engine_slots_resident", "Slots that hold an adapter.", self._taken or 0),
            ("mta:adapters_in_use", "Distinct recipes among the engine's requests.", len(names.in_flight())),
            ("mta:adapter_names", "Recipes with an assigned engine id.", len(names)),
            ("mta:adapter_names_leased", "Recipes used by open requests.", names.leased),
        ):
            yield GaugeMetricFamily(name, meaning, value)
        prepares = CounterMetricFamily(
            "mta_engine_prepares",
            "Requests with an adapter, by kind: warm if the adapter was ready, cold if it had to be fused.",
            labels=("kind",),
        )
        prepares.add_metric(("cold",), fuses)
        prepares.add_metric(("warm",), self._warm)
        yield prepares


@dataclass(frozen=True)
class RefreshMetrics:
    """ASGI middleware that refreshes the workers' metrics before `/metrics` is answered."""

    app: ASGIApp
    metrics: Callable[[], AdapterMetrics | None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/metrics" and (metrics := self.metrics()) is not None:
            await metrics.refresh()
        await self.app(scope, receive, send)


def publish(engine_client: Any, names: AdapterNames, slots: int) -> AdapterMetrics:
    """Publish the adapter metrics, and remove vLLM's gauge with adapter names."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    metrics = AdapterMetrics(lambda: engine_client.collective_rpc("mta", args=("measured",)), names, slots)
    REGISTRY.register(metrics)
    manager = engine_client.logger_manager
    for logger in manager.stat_loggers if manager is not None else ():
        if isinstance(logger, PrometheusStatLogger) and logger.gauge_lora_info is not None:
            REGISTRY.unregister(logger.gauge_lora_info)
            logger.gauge_lora_info = None
    return metrics
