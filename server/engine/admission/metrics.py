"""What the engine's `/metrics` says of adapters: how many, and how long each step on their way takes.

vLLM's `vllm:lora_requests_info` has adapter names as label values: series without bound, and user keys in monitoring.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.v1.metrics.loggers import PrometheusStatLogger

from server.engine.admission.prepare import AdapterNames
from server.engine.fusing.figures import WorkerFigures, durations

log = logging.getLogger("mta.engine")

FRESH_S = 2.0  # longest time that `/metrics` waits for a worker amid a step; then it shows what the worker said before


class AdapterFigures(Collector):
    """Publishes what this process and the first worker have measured.

    `ask` has all workers' managers say what they `measured`; `slots` is how many adapters one batch can mix.
    """

    def __init__(self, ask: Callable[[], Awaitable[Any]], names: AdapterNames, slots: int) -> None:
        self._ask = ask
        self._names = names
        self._slots = slots
        self._asking: asyncio.Task[None] | None = None
        self._registry = CollectorRegistry()
        self.check = durations(
            self._registry, "check", "From a recipe's name to its admission, without fetching its user adapter."
        )
        self._taken: int | None = None
        self._prepares = 0
        self._of_worker = WorkerFigures().text

    async def refresh(self) -> None:
        """Ask the workers; one question at a time, and not for long."""
        await asyncio.wait([self._question()], timeout=FRESH_S)

    def brief(self) -> dict[str, int]:
        """What the workers said when they were last asked; asks them again, without waiting."""
        self._question()
        counts = {"prepares": self._prepares, "fuses": self._fuses()}
        return counts if self._taken is None else counts | {"slots_taken": self._taken}

    def _question(self) -> asyncio.Task[None]:
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._answered())
        return self._asking

    async def _answered(self) -> None:
        try:
            self._taken, self._of_worker = (await self._ask())[0]
            checks = self._registry.get_sample_value("mta_engine_check_seconds_count")
            self._prepares = int(checks or 0)  # of the same moment: they are compared
        except Exception as error:
            log.debug("the workers did not say what they measured: %s", error)
        finally:
            self._asking = None

    def _fuses(self) -> int:
        found = re.search(r"^mta_engine_fuse_seconds_count (\S+)$", self._of_worker, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def collect(self) -> Iterator[Metric]:
        for metric in text_string_to_metric_families(generate_latest(self._registry).decode() + self._of_worker):
            if not metric.name.endswith("_created"):  # since when something is counted says nothing
                yield metric
        names, fuses = self._names, self._fuses()
        shared = "Requests admitted while another one under the same recipe was open."
        yield CounterMetricFamily("mta_engine_fuses", "Recipes fused.", fuses)
        yield CounterMetricFamily("mta_engine_shared_slots", shared, names.shared)
        for name, meaning, value in (
            ("mta_engine_slots", "LoRA slots.", self._slots),
            ("mta_engine_slots_resident", "Slots that hold an adapter.", self._taken or 0),
            ("mta:adapters_in_use", "Distinct recipes among the engine's requests.", len(names.in_flight())),
            ("mta:adapter_names", "Recipes whose engine id is remembered.", len(names)),
            ("mta:adapter_names_leased", "Recipes that an open request holds.", names.leased),
        ):
            yield GaugeMetricFamily(name, meaning, value)
        prepares = CounterMetricFamily(
            "mta_engine_prepares",
            "Requests that an adapter was made ready for: warm ones found it there, cold ones had it fused.",
            labels=("kind",),
        )
        prepares.add_metric(("cold",), fuses)
        prepares.add_metric(("warm",), max(0, self._prepares - fuses))
        yield prepares


@dataclass(frozen=True)
class Refreshing:
    """ASGI middleware: has the workers asked before `/metrics` is answered."""

    app: ASGIApp
    figures: Callable[[], AdapterFigures | None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/metrics" and (figures := self.figures()) is not None:
            await figures.refresh()
        await self.app(scope, receive, send)


def publish(engine_client: Any, names: AdapterNames, slots: int) -> AdapterFigures:
    """Publish all that is measured, and vLLM's gauge of adapters' names no more (`server/engine/patches.py`)."""
    figures = AdapterFigures(lambda: engine_client.collective_rpc("mta", args=("measured",)), names, slots)
    REGISTRY.register(figures)
    manager = engine_client.logger_manager
    for logger in manager.stat_loggers if manager is not None else ():
        if isinstance(logger, PrometheusStatLogger) and logger.gauge_lora_info is not None:
            REGISTRY.unregister(logger.gauge_lora_info)
            logger.gauge_lora_info = None
    return figures
