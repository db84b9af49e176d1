"""Adapter gauges with a fixed set of labels, replacing one whose labels grow with every recipe.

`vllm:lora_requests_info` puts adapter names into label values: a time series for each combination ever seen, and
user keys in the monitoring. An operator only needs counts.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Gauge
from vllm.v1.metrics.loggers import PrometheusStatLogger

from server.engine.admission.names import AdapterNames


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


def install(engine_client: Any, names: AdapterNames[Any]) -> None:
    """Replace the gauge of a running engine client and publish the size of its name map."""
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
